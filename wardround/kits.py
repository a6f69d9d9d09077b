"""Which kit was meant, where a command was given another folder of the consortium."""

from pathlib import Path

from shared.kit import MANIFEST

COORDINATOR, SITES = "coordinator", "sites"  # in the folder that `wardround provision` made
MOST_NAMED = 5


def coordinator_meant(path: Path) -> str:
    """`give kits/coordinator`, where that is a kit and `path` is its folder's parent or another kit beside it; else an empty text."""
    found = [base / COORDINATOR for base in _bases(path) if (base / COORDINATOR / MANIFEST).is_file()]
    return f"give {found[0]}" if found else ""


def site_meant(path: Path) -> str:
    """`give kits/sites/north, or kits/sites/south`, as `coordinator_meant`."""
    for base in _bases(path):
        found = [str(manifest.parent) for manifest in sorted((base / SITES).glob(f"*/{MANIFEST}"))]
        if found:
            return f"give {', or '.join(found[:MOST_NAMED])}{', or ...' if len(found) > MOST_NAMED else ''}"
    return ""


def _bases(path: Path) -> tuple[Path, Path, Path]:
    """Where the consortium's folder may be: it is `path`, or that of a kit or of all sites' kits."""
    return path, path.parent, path.parent.parent
