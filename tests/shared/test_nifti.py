"""NIfTI: slices as a radiologist sees them, whatever the order of axes; bounds before anything is unpacked; bad files by name; pairs of volumes."""

import gzip
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest

from shared.errors import DataAccessError, DataMissingError, SchemaError
from shared.tasks.lesion_segmentation import SIDE, chosen_slices, load_cohort
from shared.tasks.nifti import HARMLESS_BYTES, read_nifti

RNG = np.random.default_rng(0)
VALUES = RNG.integers(0, 256, size=(5, 6, 7), dtype=np.uint8)  # right, front, head
RAS = np.diag([1.0, 1.0, 2.0, 1.0])


def write(path: Path, values: np.ndarray = VALUES, affine: np.ndarray = RAS, *, window: tuple[float, float] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, affine)
    if window is not None:
        image.header["cal_min"], image.header["cal_max"] = window
    nibabel.save(image, path)
    return path


def seen(values: np.ndarray) -> np.ndarray:
    """Slices `(D, H, W)` of values in right, front, head: front at the top, the patient's right at the left."""
    return np.stack(
        [[[values[x, y, z] for x in reversed(range(values.shape[0]))] for y in reversed(range(values.shape[1]))] for z in range(values.shape[2])]
    )


class TestFiles:
    """One file as slices."""

    @pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
    @pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
    def test_a_volume_in_any_order_of_axes_gives_the_same_slices(self, tmp_path: Path, name: str, kind: type) -> None:
        for codes in ("RAS", "LPS", "SAR", "PIL", "IRA"):
            turn = nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(codes))
            values = nibabel.orientations.apply_orientation(VALUES, turn)
            nibabel.save(kind(values, RAS @ nibabel.orientations.inv_ornt_aff(turn, VALUES.shape)), tmp_path / name)
            volume = read_nifti(tmp_path / name, source="a")
            grey, usable = volume.grey("a")
            assert np.allclose(grey, seen(VALUES) / 255, atol=1e-6) and usable.all() and np.allclose(volume.affine, RAS)

    def test_an_image_of_two_axes_is_one_slice(self, tmp_path: Path) -> None:
        volume = read_nifti(write(tmp_path / "a.nii", VALUES[:, :, 0]), source="a")
        assert np.array_equal(volume.values, seen(VALUES[:, :, :1]))
        assert np.array_equal(read_nifti(write(tmp_path / "b.nii", VALUES[..., None]), source="a").values, seen(VALUES))

    def test_intensities_are_by_window_or_type(self, tmp_path: Path) -> None:
        hounsfield = np.array([[[-1000, -300, 400, 2000, -3000]]], dtype=np.int16)
        grey, _ = read_nifti(write(tmp_path / "a.nii", hounsfield, window=(-1000, 400)), source="a").grey("a")
        assert np.allclose(grey.ravel(), [0, 0.5, 1, 1, 0])
        with pytest.raises(SchemaError, match="int16 without a window"):
            read_nifti(write(tmp_path / "b.nii", hounsfield), source="a").grey("a")
        scaled = nibabel.Nifti1Image(hounsfield, RAS)
        scaled.header.set_slope_inter(0.001, 0.3)
        nibabel.save(nibabel.Nifti1Image(np.array([[[0.25, 0.5]]], dtype=np.float64), RAS), tmp_path / "c.nii")
        assert np.allclose(read_nifti(tmp_path / "c.nii", source="a").grey("a")[0].ravel(), [0.25, 0.5])

    def test_a_slope_makes_numbers_of_the_values(self, tmp_path: Path) -> None:
        image = nibabel.Nifti1Image(VALUES, RAS)
        content = bytearray(image.to_bytes())
        content[112:120] = struct.pack("<ff", 0.5 / 255, 0.25)
        (tmp_path / "a.nii").write_bytes(content)
        grey, usable = read_nifti(tmp_path / "a.nii", source="a").grey("a")
        assert np.allclose(grey, seen(VALUES) / 510 + 0.25, atol=1e-6) and usable.all()

    @pytest.mark.parametrize("bad", [np.nan, np.inf, 1.5, -0.1, 1e300])
    def test_a_slice_with_a_value_that_is_none_is_unusable_and_no_other(self, tmp_path: Path, bad: float) -> None:
        values = VALUES / 255
        values[1, 2, 3] = bad
        grey, usable = read_nifti(write(tmp_path / "a.nii", values), source="a").grey("a")
        assert usable.tolist() == [index != 3 for index in range(7)] and np.isfinite(grey).all()

    @pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
    def test_cut_short_anywhere_it_is_refused(self, tmp_path: Path, name: str) -> None:
        content = write(tmp_path / name).read_bytes()
        for end in range(1, len(content) - 8, 11):
            (tmp_path / name).write_bytes(content[:end])
            with pytest.raises(SchemaError):
                read_nifti(tmp_path / name, source="a")

    def test_damaged_anywhere_it_is_refused_or_read(self, tmp_path: Path) -> None:
        content, refused = write(tmp_path / "a.nii").read_bytes(), 0
        for place in range(0, 352):
            damaged = bytearray(content)
            damaged[place] ^= 0xFF
            (tmp_path / "a.nii").write_bytes(damaged)
            try:
                grey, _ = read_nifti(tmp_path / "a.nii", source="a").grey("a")
                assert np.isfinite(grey).all()
            except SchemaError:
                refused += 1
        assert refused > 10

    def test_empty_absent_foreign_and_forbidden_are_told_apart(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "e.nii").write_bytes(b"")
        with pytest.raises(DataMissingError, match="empty file"):
            read_nifti(tmp_path / "e.nii", source="a")
        with pytest.raises(DataMissingError, match="found none"):
            read_nifti(tmp_path / "absent.nii", source="a")
        (tmp_path / "f.nii").write_bytes(b"%PDF-1.4" * 100)
        with pytest.raises(SchemaError, match="cannot be read"):
            read_nifti(tmp_path / "f.nii", source="a")

        def forbidden(*_: object, **__: object) -> None:
            raise PermissionError

        write(tmp_path / "a.nii")
        monkeypatch.setattr("builtins.open", forbidden)
        with pytest.raises(DataAccessError, match="may not read"):
            read_nifti(tmp_path / "a.nii", source="a")

    @pytest.mark.parametrize("values", [np.zeros((2, 2, 2, 3), dtype=np.uint8), np.zeros((2, 2, 2), dtype=np.complex64)])
    def test_what_is_no_grey_volume_is_refused(self, tmp_path: Path, values: np.ndarray) -> None:
        with pytest.raises(SchemaError, match="point in time|expected numbers"):
            read_nifti(write(tmp_path / "a.nii", values), source="a")

    def test_colours_and_singular_affines_are_refused(self, tmp_path: Path) -> None:
        colours = np.zeros((2, 2, 2), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
        with pytest.raises(SchemaError, match="expected numbers"):
            read_nifti(write(tmp_path / "a.nii", colours), source="a")
        image = nibabel.Nifti1Image(VALUES, RAS)
        image.header.set_sform(np.diag([1.0, 1.0, 0.0, 1.0]), code=1)
        (tmp_path / "b.nii").write_bytes(image.header.binaryblock + bytes(4) + VALUES.tobytes())
        with pytest.raises(SchemaError):
            read_nifti(tmp_path / "b.nii", source="a")

    @pytest.mark.parametrize("sides", [(700, 700, 700), (32000, 32000, 32000), (-5, 6, 7)])
    def test_what_a_header_promises_is_bounded_before_it_is_unpacked(self, tmp_path: Path, sides: tuple[int, ...]) -> None:
        head = bytearray(nibabel.Nifti1Image(VALUES, RAS).to_bytes()[:352])
        head[42:48] = struct.pack("<3h", *sides)
        (tmp_path / "a.nii.gz").write_bytes(gzip.compress(bytes(head) + bytes(2**20)))
        with pytest.raises(SchemaError, match="not unpacked" if sides[0] > 0 else "NIfTI|image"):
            read_nifti(tmp_path / "a.nii.gz", source="a")
        assert HARMLESS_BYTES < 700**3

    def test_what_follows_the_promised_bytes_is_never_unpacked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        content = nibabel.Nifti1Image(VALUES, RAS).to_bytes()
        (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content + bytes(2**24)))
        asked: list[int] = []
        read = gzip.GzipFile.read

        def counted(self: gzip.GzipFile, size: int | None = -1) -> bytes:
            asked.append(-1 if size is None else size)
            return read(self, size)

        monkeypatch.setattr(gzip.GzipFile, "read", counted)
        assert np.array_equal(read_nifti(tmp_path / "a.nii.gz", source="a").values, seen(VALUES))
        assert min(asked) >= 0 and sum(asked) <= len(content)


def pair(
    folder: Path, name: str = "a.nii.gz", *, num_slices: int = 9, ill: tuple[int, ...] = (2, 3), **changes: object
) -> tuple[np.ndarray, np.ndarray]:
    """Write image and mask of a volume of SIDE x SIDE slices; give them as they are to be read."""
    values = RNG.integers(0, 256, size=(SIDE, SIDE, num_slices), dtype=np.uint8)
    mask = np.zeros(values.shape, dtype=np.uint8)
    for index in ill:
        mask[3 : 5 + index, 4:9, index] = 1
    write(folder / "images" / name, values)
    write(folder / "masks" / name, changes.get("mask", mask), changes.get("affine", RAS))  # type: ignore[arg-type]
    return seen(values), seen(mask)


class TestPairs:
    """Volumes with masks, as `lesion-segmentation` takes them."""

    def test_slices_of_a_volume_are_records_of_one_patient(self, tmp_path: Path) -> None:
        images, masks = pair(tmp_path)
        pair(tmp_path, "b.nii.gz", ill=(), num_slices=4)
        cohort = load_cohort(tmp_path, {})
        chosen = chosen_slices(masks.any(axis=(1, 2)))
        assert cohort.patient_of_record.tolist() == [0] * 4 + [1] and len(chosen) == 4 and {2, 3} <= set(chosen.tolist())
        assert np.allclose(cohort.inputs[0][:4, 0], images[chosen] / 127.5 - 1, atol=1e-6) and np.array_equal(cohort.labels[:4], masks[chosen])
        (tmp_path / "list.csv").write_text("image,mask,patient,site\nimages/a.nii.gz,masks/a.nii.gz,x,s\nimages/b.nii.gz,masks/b.nii.gz,x,s\n")
        listed = load_cohort(tmp_path / "list.csv", {})
        assert listed.patient_ids == ("x",) and listed.attributes["site"].tolist() == ["s"] and np.array_equal(listed.labels, cohort.labels)

    def test_which_slices_are_records(self) -> None:
        ill = np.zeros(40, dtype=bool)
        assert chosen_slices(ill).tolist() == [20]
        ill[10:14] = True
        assert chosen_slices(ill).tolist() == [4, 10, 11, 12, 13, 17, 26, 35]
        assert chosen_slices(np.ones(3, dtype=bool)).tolist() == [0, 1, 2]

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"affine": np.diag([1.0, 1.0, 2.5, 1.0])}, "shape and affine"), ({"mask": np.zeros((SIDE, SIDE, 8), dtype=np.uint8)}, "shape and affine"),
            ({"mask": np.full((SIDE, SIDE, 9), 3, dtype=np.uint8)}, "outside its set"), ({"mask": np.full((SIDE, SIDE, 9), np.nan)}, "outside its set"),
            ({"mask": np.ones((SIDE, SIDE, 9), dtype=np.uint8)}, "more than half"),
        ],
    )  # fmt: skip
    def test_a_mask_that_does_not_fit_is_refused_by_name(self, tmp_path: Path, changes: dict[str, object], match: str) -> None:
        pair(tmp_path, **changes)  # type: ignore[arg-type]
        with pytest.raises(SchemaError, match=match):
            load_cohort(tmp_path, {})

    def test_one_bad_pair_is_one_bad_record(self, tmp_path: Path) -> None:
        for number in range(6):
            pair(tmp_path, f"{number}.nii", ill=(1, 2, 3))
        (tmp_path / "masks" / "3.nii").write_bytes((tmp_path / "masks" / "3.nii").read_bytes()[:500])
        cohort = load_cohort(tmp_path, {"tolerance": 0.1})
        assert cohort.num_patients == 5 and cohort.num_records == 30 and cohort.notes == {"records_dropped": 1}
        with pytest.raises(SchemaError, match="got 1 of 31.*cut short"):
            load_cohort(tmp_path, {"tolerance": 0.01})

    def test_other_files_beside_nifti_are_refused(self, tmp_path: Path) -> None:
        pair(tmp_path)
        (tmp_path / "images" / "a.png").write_bytes(b"")
        with pytest.raises(SchemaError, match="got both"):
            load_cohort(tmp_path, {})
