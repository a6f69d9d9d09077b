"""Where real sites are described: files that hospitals own."""

from pathlib import Path

from shared.files import storage_errors

SITE_FILE = "site.toml"


def site_files(data: Path | None) -> list[Path]:
    """The site files at `data`: itself, the one in it, or `*/site.toml` in it; none where `data` is a cohort."""
    if data is None or not data.exists():
        return []
    if data.is_file():
        return [data] if data.name == SITE_FILE else []
    if (data / SITE_FILE).is_file():
        return [data / SITE_FILE]
    with storage_errors(data, "read the folder"):
        return sorted(data.glob(f"*/{SITE_FILE}"))
