"""DICOM: pixels as pydicom shows them, nothing of the header but what is needed, series whose geometry holds, and bad files by name."""

import logging
import warnings
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import apply_modality_lut, apply_windowing
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEGLSLossless, RLELossless

from shared.errors import DataAccessError, DataError, DataMissingError, SchemaError
from shared.tasks import chest_xray, dicom
from shared.tasks.dicom import AIR, hounsfield_box, read_dicom, series_of_folder
from shared.tasks.images import MOST_PIXELS, read_images

SAMPLES = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dicom"
SERIES = "1.2.3.4.5"
RNG = np.random.default_rng(0)
STORED = RNG.integers(0, 4096, size=(6, 9), dtype=np.uint16)


def dataset_of(stored: np.ndarray, **changes: object) -> Dataset:
    """A CT slice of these stored values, `(H, W)` uint16; None takes an element away."""
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, pydicom.uid.generate_uid()
    values = {
        "PatientID": "P1", "Modality": "CT", "SeriesInstanceUID": SERIES, "Rows": stored.shape[0], "Columns": stored.shape[1], "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0,
        "RescaleSlope": "1", "RescaleIntercept": "-1024", "ImagePositionPatient": [0.0, 0.0, 0.0], "ImageOrientationPatient": [1.0, 0, 0, 0, 1.0, 0],
        "PixelSpacing": [1.0, 1.0], "PixelData": np.ascontiguousarray(stored).tobytes(),
    }  # fmt: skip
    for name, value in {**values, **changes}.items():
        if value is not None:
            setattr(header, name, value)
    return header


def write(path: Path, stored: np.ndarray = STORED, **changes: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are wrong on purpose
        dataset_of(stored, **changes).save_as(path, enforce_file_format=True)
    return path


def write_series(folder: Path, volume: np.ndarray, *, gap: float = 1.0, **changes: object) -> Path:
    """Slices of a volume `(D, H, W)`, stored values, in a shuffled order of names."""
    for number, place in enumerate(RNG.permutation(len(volume))):
        write(folder / f"IM{number:03}.dcm", volume[place], ImagePositionPatient=[0.0, 0.0, float(place * gap)], **changes)
    return folder


class TestImages:
    """One file as a grey image."""

    @pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
    @pytest.mark.parametrize(("centre", "width"), [(40, 400), (-600, 1500), (100.5, 77.25), (0, 1.5)])
    def test_windows_are_those_of_pydicom(self, tmp_path: Path, function: str | None, centre: float, width: float) -> None:
        path = write(tmp_path / "a.dcm", WindowCenter=[str(centre), "1"], WindowWidth=[str(width), "2"], VOILUTFunction=function)
        header = pydicom.dcmread(path)
        with np.errstate(over="ignore"):  # of its exponential
            shown = apply_windowing(apply_modality_lut(header.pixel_array, header), header)
        low, high = -1024, 4095 - 1024
        assert np.allclose(read_dicom(path, source="a"), (shown - low) / (high - low), atol=1e-6)

    @pytest.mark.parametrize("slope", ["1", "2.5", "-1"])
    @pytest.mark.parametrize("signed", [0, 1])
    def test_without_a_window_all_bits_stored_are_shown(self, tmp_path: Path, slope: str, signed: int) -> None:
        stored = (STORED.astype(np.int32) - 2048 * signed).astype(np.int16 if signed else np.uint16)
        grey = read_dicom(write(tmp_path / "a.dcm", stored, RescaleSlope=slope, PixelRepresentation=signed), source="a")
        expected = STORED / 4095
        assert grey.dtype == np.float32 and np.allclose(grey, 1 - expected if slope == "-1" else expected, atol=1e-6)

    def test_monochrome1_is_inverted_and_padding_is_black(self, tmp_path: Path) -> None:
        stored = STORED.copy()
        stored[0, :3], stored[1, 0] = 4000, 4001
        normal = read_dicom(write(tmp_path / "a.dcm", stored), source="a")
        inverted = read_dicom(write(tmp_path / "b.dcm", stored, PhotometricInterpretation="MONOCHROME1"), source="a")
        assert np.allclose(normal, 1 - inverted, atol=1e-6)
        padded = read_dicom(
            write(tmp_path / "c.dcm", stored, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=4000, PixelPaddingRangeLimit=4001),
            source="a",
        )
        padding = (stored == 4000) | (stored == 4001)
        assert (padded[padding] == 0).all() and np.array_equal(padded[~padding], inverted[~padding])

    def test_the_values_of_an_image_do_not_move_its_scale(self, tmp_path: Path) -> None:
        other = STORED.copy()
        other[0, 0] = 0 if STORED[0, 0] else 4095
        one, two = (read_dicom(write(tmp_path / "a.dcm", stored), source="a") for stored in (STORED, other))
        assert (one != two).sum() == 1

    def test_rle_is_unpacked_and_what_has_no_decoder_says_so(self, tmp_path: Path) -> None:
        header = dataset_of(STORED)
        header.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
        header.save_as(tmp_path / "rle.dcm", enforce_file_format=True)
        assert np.array_equal(read_dicom(tmp_path / "rle.dcm", source="a"), read_dicom(write(tmp_path / "a.dcm"), source="a"))
        header = dataset_of(STORED, PixelData=encapsulate([b"\xff\xd8\xff\xf7" + bytes(20)]))
        header["PixelData"].is_undefined_length = True
        header.file_meta.TransferSyntaxUID = JPEGLSLossless
        header.save_as(tmp_path / "jls.dcm", enforce_file_format=True)
        from pydicom.pixels.decoders import JPEGLSLosslessDecoder

        match = "cannot be read" if JPEGLSLosslessDecoder.is_available else "JPEG-LS Lossless.*no decoder"
        with pytest.raises(SchemaError, match=match):
            read_dicom(tmp_path / "jls.dcm", source="a")

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"PixelData": None}, "without pixels"), ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3, "PlanarConfiguration": 0}, "got RGB"),
            ({"PhotometricInterpretation": "SMITH"}, "got another kind"), ({"NumberOfFrames": 2}, "2 frames"), ({"BurnedInAnnotation": "YES"}, "burned"),
            ({"RescaleSlope": "0"}, "slope"), ({"WindowCenter": "1", "WindowWidth": "0"}, "window"),
            ({"WindowCenter": "1", "WindowWidth": "9", "VOILUTFunction": "SMITH"}, "window"), ({"Rows": 0}, "pixels"), ({"Rows": None}, "cannot be read"),
            ({"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}, "at most 16 bits"), ({"Rows": 7}, "cannot be read"),
            ({"PixelData": STORED.tobytes()[:-10]}, "cannot be read"), ({"RescaleSlope": "nan"}, "cannot be read"),
        ],
    )  # fmt: skip
    def test_what_is_no_grey_image_is_refused_by_name(self, tmp_path: Path, changes: dict[str, object], match: str) -> None:
        with pytest.raises(SchemaError, match=match) as caught:
            read_dicom(write(tmp_path / "a.dcm", **changes), source="here")
        assert "SMITH" not in str(caught.value) and "here" in str(caught.value)

    def test_a_list_may_name_dicom_beside_png(self, tmp_path: Path) -> None:
        stored = RNG.integers(0, 256, size=(chest_xray.SIDE, chest_xray.SIDE), dtype=np.uint8)
        Image.fromarray(stored).save(tmp_path / "b.png")
        write(tmp_path / "deep" / "a.DCM", stored, BitsAllocated=8, BitsStored=8, HighBit=7, PatientName="Annabel^Smith")
        columns = ",".join(["image", *chest_xray.FINDINGS])
        (tmp_path / "list.csv").write_text(f"{columns}\ndeep/a.DCM,1,0,0,0,0\nb.png,1,0,0,0,0\n")
        images = chest_xray.load_cohort(tmp_path, {}).inputs[0]
        assert np.array_equal(images[0], images[1]) and np.allclose(images[0, 0], stored / 127.5 - 1, atol=1e-6)

    def test_too_many_pixels_are_not_unpacked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write(tmp_path / "a.dcm", Rows=65535, Columns=65535)
        monkeypatch.setattr(Dataset, "pixel_array", property(lambda _: pytest.fail("it was unpacked")))
        with pytest.raises(SchemaError, match=f"1 to {MOST_PIXELS} pixels"):
            read_dicom(path, source="a")

    def test_a_deflated_file_is_not_unpacked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        header = dataset_of(np.zeros((2000, 2000), dtype=np.uint16))
        header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        header.save_as(tmp_path / "a.dcm", enforce_file_format=True)
        assert (tmp_path / "a.dcm").stat().st_size * 100 < 8_000_000
        monkeypatch.setattr(zlib, "decompress", lambda *_: pytest.fail("it was unpacked"))
        with pytest.raises(SchemaError, match="deflated"):
            read_dicom(tmp_path / "a.dcm", source="a")

    def test_empty_absent_foreign_and_forbidden_are_told_apart(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "e.dcm").write_bytes(b"")
        with pytest.raises(DataMissingError, match="empty file"):
            read_dicom(tmp_path / "e.dcm", source="a")
        with pytest.raises(DataMissingError, match="found none"):
            read_dicom(tmp_path / "absent.dcm", source="a")
        for foreign in (b"%PDF-1.4" + bytes(500), write(tmp_path / "a.dcm").read_bytes()[132:]):
            (tmp_path / "f.dcm").write_bytes(foreign)
            with pytest.raises(SchemaError, match="without the mark DICM"):
                read_dicom(tmp_path / "f.dcm", source="a")

        def forbidden(*_: object, **__: object) -> None:
            raise PermissionError

        monkeypatch.setattr(dicom, "_has_mark", forbidden)
        with pytest.raises(DataAccessError, match="record 1: this user may not read it"):
            read_images(tmp_path, ["a.dcm"], side=4, source="list.csv")

    def test_cut_short_anywhere_or_damaged_anywhere_it_is_refused_or_read_and_never_else(self, tmp_path: Path) -> None:
        content = write(tmp_path / "a.dcm").read_bytes()
        path, refused = tmp_path / "b.dcm", 0
        for end in range(0, len(content) - 1, 7):
            path.write_bytes(content[:end])
            with pytest.raises(DataError):
                read_dicom(path, source="a")
        rng = np.random.default_rng(1)
        for place in rng.integers(132, len(content), size=150):
            damaged = bytearray(content)
            damaged[place] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                grey = read_dicom(path, source="a")
                assert grey.dtype == np.float32 and grey.min() >= 0 and grey.max() <= 1
            except DataError:
                refused += 1
            (tmp_path / "a.dcm").unlink(missing_ok=True)
            assert not series_of_folder(tmp_path, [SERIES]).series  # one slice is no series; and no warning, which would be an error here
        assert refused > 5


class TestPatients:
    """What a header says of a patient stays in it."""

    def test_names_planted_in_every_text_leave_no_trace(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
    ) -> None:
        caplog.set_level(logging.DEBUG)
        texts = {
            keyword: kind
            for tag, (kind, _, _, _, keyword) in pydicom.datadict.DicomDictionary.items()
            if kind in ("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT") and keyword and tag >> 16 not in (0, 2)
        }
        needed = {*dicom.PIXEL_TAGS, *dicom.SLICE_TAGS} - {"PatientID"}
        bad, good = dataset_of(STORED), dataset_of(STORED)
        with warnings.catch_warnings(), caplog.at_level(logging.CRITICAL + 1, logger="pydicom"):
            warnings.simplefilter("ignore")  # of values that are wrong on purpose
            for header, keywords in ((bad, texts.keys()), (good, texts.keys() - needed)):
                for keyword in keywords:
                    header.add_new(pydicom.datadict.tag_for_keyword(keyword), texts[keyword], "Annabel^Smith")
                header.private_block(0x0009, "Smith", create=True).add_new(1, "LO", "Annabel^Smith")
            bad.save_as(tmp_path / "bad.dcm", enforce_file_format=True)
            good.save_as(tmp_path / "good.dcm", enforce_file_format=True)
        caplog.clear()
        assert len(texts) > 1000
        num_read, seen = 0, []
        for path in (tmp_path / "bad.dcm", tmp_path / "good.dcm"):
            content = path.read_bytes()
            for end in (len(content), len(content) - 40, 400, 900, 20_000):
                (tmp_path / "cut.dcm").write_bytes(content[:end])
                try:
                    seen.append(repr(read_dicom(tmp_path / "cut.dcm", source="a")))
                    num_read += 1
                except DataError as error:
                    seen += [str(error), error.remedy]
        assert num_read == 1
        folder = series_of_folder(write_series(tmp_path / "ct", STORED[None].repeat(3, axis=0), PatientID="Annabel^Smith"), [SERIES])
        seen += [repr(folder), repr(folder.series), repr(folder.problems), repr(folder.series[SERIES].slices[0]), caplog.text, *map(str, recwarn)]
        assert folder.series[SERIES].patient == "Annabel^Smith" and len(seen) > 10  # the identifier is known, and printed nowhere
        assert not any("Smith" in text for text in seen)

    def test_elements_that_are_not_needed_are_not_read(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.dcm", PatientName="Annabel^Smith", InstitutionName="Mercy")
        header = dicom._header(path, dicom.PIXEL_TAGS, pixels=True, source="a")
        assert "PatientName" not in header and "InstitutionName" not in header and "PatientID" not in header and "PixelData" in header


class TestSeries:
    """A folder of slices as an even grid."""

    def test_slices_come_in_the_order_in_which_they_lie(self, tmp_path: Path) -> None:
        volume = RNG.integers(0, 4096, size=(7, 6, 9), dtype=np.uint16)
        (tmp_path / "ct" / "deep").mkdir(parents=True)
        write_series(tmp_path / "ct" / "deep", volume, gap=1.25, PixelSpacing=[0.7, 0.8])
        write(tmp_path / "ct" / "other.dcm", SeriesInstanceUID="9.9")
        (tmp_path / "ct" / "list.csv").write_text("a\n")
        (tmp_path / "ct" / "bad.dcm").write_bytes(b"no")
        folder = series_of_folder(tmp_path / "ct", [SERIES])
        series = folder.series[SERIES]
        assert folder.num_unreadable == 1 and not folder.problems and list(folder.series) == [SERIES] and series.size == (7, 6, 9)
        assert series.spacing.tolist() == [1.25, 0.7, 0.8]
        assert np.array_equal(hounsfield_box(series, (0, 0, 0), series.size, source="a"), volume.astype(np.float32) - 1024)
        assert np.array_equal(hounsfield_box(series, (2, 1, 3), (4, 5, 9), source="a"), volume[2:4, 1:5, 3:9].astype(np.float32) - 1024)
        assert np.allclose(series.index_of(np.array([[0.8 * 4], [0.7 * 3], [1.25 * 5]]))[:, 0], [5, 3, 4])

    def test_only_the_slices_asked_for_are_read(self, tmp_path: Path) -> None:
        series = series_of_folder(write_series(tmp_path, STORED[None].repeat(6, axis=0)), [SERIES]).series[SERIES]
        for part in series.slices[:2] + series.slices[4:]:
            part.path.unlink()
        assert hounsfield_box(series, (2, 0, 0), (4, 2, 2), source="a").shape == (2, 2, 2)
        with pytest.raises(DataMissingError, match="found none"):
            hounsfield_box(series, (1, 0, 0), (4, 2, 2), source="a")

    def test_padding_is_air(self, tmp_path: Path) -> None:
        stored = np.where(STORED > 2000, 4000, STORED).astype(np.uint16)
        series = series_of_folder(write_series(tmp_path, stored[None].repeat(2, axis=0), PixelPaddingValue=4000), [SERIES]).series[SERIES]
        box = hounsfield_box(series, (0, 0, 0), (1, 6, 9), source="a")[0]
        assert (box[stored == 4000] == AIR).all() and np.array_equal(box[stored != 4000], stored[stored != 4000].astype(np.float32) - 1024)

    @pytest.mark.parametrize(
        ("places", "match"),
        [
            ([0, 1, 2, 4, 5], "a slice is missing"), ([0, 1, 3], "a slice is missing"), ([0, 1, 2, 2, 3], "two at the same place"),
            ([0, 1, 2, 3, 5, 7, 9], "mixed spacings"), ([0, 1.0, 2.4, 3.1], "mixed spacings"), ([0], "at least two slices"),
            ([0, 7, 14], "7.0 mm"), ([0, 0.06, 0.12], "0.1 mm"),
        ],
    )  # fmt: skip
    def test_uneven_slices_are_refused_by_name(self, tmp_path: Path, places: list[float], match: str) -> None:
        for number, place in enumerate(places):
            write(tmp_path / f"{number}.dcm", ImagePositionPatient=[0.0, 0.0, float(place)])
        folder = series_of_folder(tmp_path, [SERIES])
        assert not folder.series and match in folder.problems[SERIES]

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"PixelSpacing": [1.0, 1.1]}, "one pixel spacing"), ({"ImageOrientationPatient": [0, 1.0, 0, 1.0, 0, 0]}, "one orientation"),
            ({"ImageOrientationPatient": [1.0, 0, 0, 0, 2.0, 0]}, "unit vectors"), ({"ImageOrientationPatient": [1.0, 0, 0, 1.0, 0, 0]}, "unit vectors"),
            ({"ImagePositionPatient": [5.0, 0, 1.0]}, "askew"), ({"PatientID": "P2"}, "one patient"), ({"Modality": "PT"}, "expected CT"),
            ({"PixelSpacing": None}, "PixelSpacing"), ({"ImagePositionPatient": None}, "ImagePositionPatient"), ({"NumberOfFrames": 40}, "40 frames"),
            ({"PixelSpacing": [50.0, 50.0]}, "0.1 to 5 mm"), ({"BurnedInAnnotation": "YES"}, "burned"),
            ({"ImagePositionPatient": ["nan", "0", "1"]}, "cannot be read"),
        ],
    )  # fmt: skip
    def test_a_slice_that_does_not_fit_is_refused_by_name(self, tmp_path: Path, changes: dict[str, object], match: str) -> None:
        for place in (0.0, 2.0, 3.0):
            write(tmp_path / f"{place}.dcm", ImagePositionPatient=[0.0, 0.0, place])
        write(tmp_path / "1.dcm", **{"ImagePositionPatient": [0.0, 0.0, 1.0], **changes})
        folder = series_of_folder(tmp_path, [SERIES])
        assert not folder.series and match in folder.problems[SERIES]

    def test_slices_of_another_size_are_refused(self, tmp_path: Path) -> None:
        write_series(tmp_path, STORED[None].repeat(3, axis=0))
        write(tmp_path / "scout.dcm", np.zeros((4, 4), dtype=np.uint16), ImagePositionPatient=[0.0, 0.0, 3.0])
        assert "one size" in series_of_folder(tmp_path, [SERIES]).problems[SERIES]

    def test_a_folder_that_may_not_be_read_is_no_bad_series(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_series(tmp_path / "ct", STORED[None].repeat(2, axis=0))

        def forbidden(*_: object, **__: object) -> None:
            raise PermissionError

        with monkeypatch.context() as patched, pytest.raises(DataAccessError, match="may not read"):
            patched.setattr(dicom, "_has_mark", forbidden)
            series_of_folder(tmp_path, [SERIES])
        monkeypatch.setattr("os.scandir", forbidden)
        with pytest.raises(DataAccessError, match="may not read"):
            series_of_folder(tmp_path, [SERIES])
        with pytest.raises(DataMissingError, match="folder of DICOM"):
            series_of_folder(tmp_path / "absent", [SERIES])


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="shared/data/dicom is not here")
class TestRealFiles:
    """Files of pydicom's test set."""

    @pytest.mark.parametrize("name", ["CT_small", "MR_small", "MR_small_RLE", "MR_small_implicit", "JPEG2000"])
    def test_images_are_as_pydicom_shows_them(self, name: str) -> None:
        grey = read_dicom(SAMPLES / f"{name}.dcm", source="a")
        header = pydicom.dcmread(SAMPLES / f"{name}.dcm")
        shown = apply_windowing(apply_modality_lut(header.pixel_array, header), header).astype(np.float64)
        bits, slope, intercept = header.BitsStored, float(header.get("RescaleSlope", 1)), float(header.get("RescaleIntercept", 0))
        low = -(2 ** (bits - 1)) * header.PixelRepresentation * slope + intercept
        expected = (shown - low) / ((2**bits - 1) * slope)
        if "PixelPaddingValue" in header:
            expected[header.pixel_array == header.PixelPaddingValue] = 0
        assert np.allclose(grey, expected, atol=1e-5) and grey.min() >= 0 and grey.max() <= 1

    @pytest.mark.parametrize(
        ("name", "match"),
        [
            ("rtplan", "without pixels"), ("rtstruct", "mark DICM"), ("waveform_ecg", "without pixels"), ("examples_rgb_color", "RGB"),
            ("rtdose_1frame", "16 bits"),
        ],
    )  # fmt: skip
    def test_what_is_no_image_is_refused(self, name: str, match: str) -> None:
        with pytest.raises(SchemaError, match=match) as caught:
            read_dicom(SAMPLES / f"{name}.dcm", source="a")
        assert "^" not in str(caught.value)
