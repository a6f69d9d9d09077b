"""The image pipeline: what is read is what was written, bad files are refused by name, and augmentation is a draw for each record."""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shared.errors import ConfigurationError, DataAccessError, DataMissingError, SchemaError
from shared.tasks.images import (
    HARMLESS_BYTES,
    MOST_EXPANSION,
    Augmentation,
    attribute_of,
    content_identifiers,
    images_of_stack,
    path_below,
    patients_of,
    read_images,
    read_listing,
    read_npz,
    read_png,
    refuse_too_many,
    text_of,
    to_square,
    tolerance_of,
)

RNG = np.random.default_rng(0)


def write_png(path: Path, values: np.ndarray, mode: str | None = None) -> Path:
    Image.fromarray(values, mode).save(path) if mode is None else Image.fromarray(values).convert(mode).save(path)
    return path


class TestArchives:
    """NPZ files, good and bad."""

    def test_arrays_come_back(self, tmp_path: Path) -> None:
        values = RNG.integers(0, 256, size=(5, 4, 4), dtype=np.uint8)
        np.savez_compressed(tmp_path / "a.npz", images=values, names=np.array(["ä", "b"]))
        arrays = read_npz(tmp_path / "a.npz", ["images"], optional=["names", "absent"])
        assert list(arrays) == ["images", "names"] and np.array_equal(arrays["images"], values) and arrays["names"].tolist() == ["ä", "b"]

    def test_one_that_unpacks_to_100_times_its_size_is_refused_unread(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "bomb.npz"
        np.savez_compressed(path, images=np.zeros(4 * HARMLESS_BYTES, dtype=np.uint8))
        assert path.stat().st_size * MOST_EXPANSION < 4 * HARMLESS_BYTES
        monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_, **__: pytest.fail("it was opened"))
        with pytest.raises(SchemaError, match="at most 100 times its size"):
            read_npz(path, ["images"])

    def test_pickled_objects_are_refused(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "p.npz", images=np.array([{"a": 1}], dtype=object))
        with pytest.raises(SchemaError, match="pickled objects"):
            read_npz(tmp_path / "p.npz", ["images"])

    def test_a_header_that_promises_more_than_there_is_takes_no_room(self, tmp_path: Path) -> None:
        member = io.BytesIO()
        np.lib.format.write_array_header_1_0(member, {"shape": (10**9, 10**4), "fortran_order": False, "descr": "|u1"})
        with zipfile.ZipFile(tmp_path / "h.npz", "w") as archive:
            archive.writestr("images.npy", member.getvalue() + b"few")
        with pytest.raises(SchemaError, match="got fewer bytes"):
            read_npz(tmp_path / "h.npz", ["images"])

    @pytest.mark.parametrize("keep", [0.3, 0.9])
    def test_one_cut_short_is_refused(self, tmp_path: Path, keep: float) -> None:
        path = tmp_path / "t.npz"
        np.savez(path, images=RNG.integers(0, 256, size=(20, 8, 8), dtype=np.uint8))
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])
        with pytest.raises(SchemaError, match="cannot be read"):
            read_npz(path, ["images"])

    def test_damaged_bytes_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "d.npz"
        np.savez(path, images=RNG.integers(0, 256, size=(20, 8, 8), dtype=np.uint8))
        content = bytearray(path.read_bytes())
        content[600] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(SchemaError, match="cannot be read"):
            read_npz(path, ["images"])

    def test_empty_absent_and_forbidden_are_told_apart(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "e.npz").write_bytes(b"")
        with pytest.raises(DataMissingError, match="empty file"):
            read_npz(tmp_path / "e.npz", ["images"])
        with pytest.raises(DataMissingError, match="found none"):
            read_npz(tmp_path / "absent.npz", ["images"])
        np.savez(tmp_path / "a.npz", images=np.zeros(3))

        def forbidden(*_: object, **__: object) -> None:
            raise PermissionError

        monkeypatch.setattr(zipfile, "ZipFile", forbidden)
        with pytest.raises(DataAccessError, match="may not read"):
            read_npz(tmp_path / "a.npz", ["images"])

    def test_an_absent_array_is_named_with_a_likely_one(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", image=np.zeros(3))
        with pytest.raises(SchemaError, match="'images'.*'image'"):
            read_npz(tmp_path / "a.npz", ["images"])

    def test_text_that_is_not_utf_8_is_refused(self) -> None:
        assert text_of(np.array(["ä".encode()]), "patients", num_records=1, source="a").tolist() == ["ä"]
        with pytest.raises(SchemaError, match="UTF-8"):
            text_of(np.array([b"\xff\xfe"]), "patients", num_records=1, source="a")
        with pytest.raises(SchemaError, match="shape"):
            text_of(np.array(["a"]), "patients", num_records=2, source="a")
        with pytest.raises(SchemaError, match="float64"):
            text_of(np.array([1.5]), "patients", num_records=1, source="a")


class TestIntensities:
    """Arrays as images in [0, 1]."""

    @pytest.mark.parametrize(("dtype", "most"), [("uint8", 255), ("uint16", 65535), ("bool", 1), ("float64", 1)])
    def test_the_range_of_the_type_becomes_0_to_1(self, dtype: str, most: float) -> None:
        read = images_of_stack(np.array([[[0, most], [most, 0]]]).astype(dtype), "images", side=2, source="a")
        assert read.images.dtype == np.float32 and read.images.tolist() == [[[0, 1], [1, 0]]] and read.usable.all()

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1.01, -0.01])
    def test_a_value_that_is_none_makes_its_image_unusable_and_no_other(self, bad: float) -> None:
        values = np.full((3, 4, 4), 0.5)
        values[1, 2, 2] = bad
        read = images_of_stack(values, "images", side=4, source="a")
        assert read.usable.tolist() == [True, False, True] and np.isfinite(read.images).all() and read.first_problem

    @pytest.mark.parametrize("shape", [(3, 4), (3, 4, 4, 3), (3, 2, 4, 4), (0, 4, 4), (3, 0, 4), (2, 2, 2, 2, 2)])
    def test_other_shapes_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(SchemaError, match="expected grey images"):
            images_of_stack(np.zeros(shape, dtype=np.uint8), "images", side=4, source="a")

    @pytest.mark.parametrize("dtype", ["int64", "complex64", "U3"])
    def test_types_without_a_known_range_are_refused(self, dtype: str) -> None:
        with pytest.raises(SchemaError, match="expected uint8"):
            images_of_stack(np.zeros((1, 2, 2)).astype(dtype), "images", side=2, source="a")

    def test_one_channel_may_stand_anywhere(self) -> None:
        values = RNG.integers(0, 256, size=(3, 5, 5), dtype=np.uint8)
        read = [images_of_stack(stack, "images", side=5, source="a").images for stack in (values, values[:, None], values[..., None])]
        assert np.array_equal(read[0], read[1]) and np.array_equal(read[0], read[2])

    @given(st.integers(1, 12), st.integers(1, 12))
    def test_an_image_is_padded_black_around_its_middle(self, height: int, width: int) -> None:
        image = np.ones((height, width), dtype=np.float32)
        side = max(height, width)
        square = to_square(image, side)
        assert square.shape == (side, side) and square.sum() == height * width
        filled = np.argwhere(square == 1)
        slack = np.array([side, side]) - 1 - filled.max(axis=0) - filled.min(axis=0)
        assert ((slack == 0) | (slack == 1)).all()

    def test_shrinking_averages(self) -> None:
        board = np.indices((32, 32)).sum(axis=0).astype(np.float32) % 2
        assert np.abs(to_square(board, 8) - 0.5).max() < 0.1


class TestPng:
    """PNG files, good and bad."""

    def test_grey_colour_16_bits_and_one_bit(self, tmp_path: Path) -> None:
        grey = RNG.integers(0, 256, size=(6, 7), dtype=np.uint8)
        assert np.array_equal(read_png(write_png(tmp_path / "g.png", grey), source="a"), grey.astype(np.float32) / 255)
        assert np.array_equal(read_png(write_png(tmp_path / "c.png", np.stack([grey] * 3, axis=-1)), source="a"), grey.astype(np.float32) / 255)
        deep = RNG.integers(0, 65536, size=(6, 7), dtype=np.uint16)
        assert np.allclose(read_png(write_png(tmp_path / "d.png", deep), source="a"), deep / 65535, atol=1e-6)
        bits = read_png(write_png(tmp_path / "b.png", np.where(grey > 127, 255, 0).astype(np.uint8), "1"), source="a")
        assert np.array_equal(bits, (grey > 127).astype(np.float32))

    def test_bad_files(self, tmp_path: Path) -> None:
        content = write_png(tmp_path / "a.png", RNG.integers(0, 256, size=(32, 32), dtype=np.uint8)).read_bytes()
        damaged = bytearray(content)
        damaged[len(content) // 2] ^= 0xFF
        for bad in (content[:40], content[: len(content) // 2], b"no image", b"%PDF-1.4", bytes(damaged)):
            (tmp_path / "bad.png").write_bytes(bad)
            with pytest.raises(SchemaError, match="expected a PNG image"):
                read_png(tmp_path / "bad.png", source="a")
        (tmp_path / "bad.png").write_bytes(b"")
        with pytest.raises(DataMissingError, match="empty file"):
            read_png(tmp_path / "bad.png", source="a")

    @pytest.mark.parametrize("side", [8_000, 12_000, 60_000])
    def test_a_bomb_is_refused_by_its_header(self, tmp_path: Path, side: int) -> None:
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
        with pytest.raises(SchemaError, match="pixels|cannot be read"):
            read_png(tmp_path / "bomb.png", source="a")

    def test_a_permission_is_not_bad_data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_png(tmp_path / "a.png", np.zeros((4, 4), dtype=np.uint8))

        def forbidden(_: Path) -> bytes:
            raise PermissionError

        monkeypatch.setattr(Path, "read_bytes", forbidden)
        with pytest.raises(DataAccessError, match="record 1: this user may not read it"):
            read_images(tmp_path, ["a.png"], side=4, source="list.csv")

    def test_bad_records_are_marked_and_name_no_file(self, tmp_path: Path) -> None:
        write_png(tmp_path / "a.png", np.full((4, 4), 255, dtype=np.uint8))
        names = ["a.png", "Smith.png", "../a.png", "/a.png", "a.txt", "", "a\0.png"]
        read = read_images(tmp_path, names, side=4, source="list.csv")
        assert read.usable.tolist() == [True] + [False] * 6 and read.images.shape == (7, 4, 4) and read.images[0].min() == 1
        assert "record 2" in read.first_problem and "Smith" not in read.first_problem


class TestRecords:
    """Lists, patients, and how many bad records are borne."""

    def test_a_list_may_quote_line_breaks(self, tmp_path: Path) -> None:
        (tmp_path / "l.csv").write_text('image,note\na.png,"two\nlines"\nb.png,one\n')
        assert read_listing(tmp_path / "l.csv", ["image"])["image"].tolist() == ["a.png", "b.png"]

    @pytest.mark.parametrize(
        ("content", "error", "match"),
        [
            (b"", DataMissingError, "empty"), (b"image\n", DataMissingError, "at least one row"), (b"images,x\na,b\n", SchemaError, "'image'"),
            (b"image\n\xff\xfe.png\n", SchemaError, "UTF-8"), (b"image,x\na,b,c\n", SchemaError, "fields"),
        ],
    )  # fmt: skip
    def test_bad_lists(self, tmp_path: Path, content: bytes, error: type[Exception], match: str) -> None:
        (tmp_path / "l.csv").write_bytes(content)
        with pytest.raises(error, match=match):
            read_listing(tmp_path / "l.csv", ["image"])

    def test_tolerance(self) -> None:
        assert tolerance_of({}, "t") == 0.05 and tolerance_of({"tolerance": 0}, "t") == 0
        for bad in ({"tolerance": 1}, {"tolerance": "x"}, {"tolerance": True}, {"tolerance": -0.1}, {"tolerance": float("nan")}, {"other": 1}):
            with pytest.raises(ConfigurationError):
                tolerance_of(bad, "t")
        refuse_too_many(5, 100, tolerance=0.05, source="a")
        for num_bad, num_records in ((6, 100), (1, 1)):
            with pytest.raises(SchemaError, match="unusable records"):
                refuse_too_many(num_bad, num_records, tolerance=0.05 if num_records > 1 else 0.99999, source="a")

    def test_records_of_a_patient_stay_under_one_identifier(self) -> None:
        patients = patients_of(["b", "a", "b", "c"], source="x")
        assert (
            patients.patient_ids == ("b", "a", "c") and patients.patient_of_record.tolist() == [0, 1, 0, 2] and patients.first.tolist() == [0, 1, 3]
        )
        assert attribute_of(np.array(["s", "t", "s", "t"]), patients, "site", source="x").tolist() == ["s", "t", "t"]
        with pytest.raises(SchemaError, match="for 1 patients"):
            attribute_of(np.array(["s", "t", "t", "t"]), patients, "site", source="x")
        with pytest.raises(SchemaError, match="none for 1"):
            patients_of(["a", ""], source="x")

    def test_an_image_more_changes_no_other_identifier(self) -> None:
        images = RNG.random((4, 3, 3))
        names = content_identifiers(np.concatenate([images, images[:1]]))
        assert content_identifiers(images) == names[:4] and len(set(names)) == 5


class TestAugmentation:
    """Drawn for each record, in training alone."""

    def test_evaluation_and_p_0_change_nothing(self) -> None:
        images = torch.randn(3, 1, 8, 8)
        assert Augmentation().eval()(images) is images and Augmentation(0.0).train()(images) is images

    def test_a_record_is_made_from_itself_alone(self) -> None:
        images = torch.rand(6, 2, 16, 16)
        other = images.clone()
        other[3] = torch.rand(2, 16, 16)
        made = []
        for batch in (images, other):
            torch.manual_seed(3)
            made.append(Augmentation().train()(batch))
        same = [bool(torch.equal(a, b)) for a, b in zip(*made, strict=True)]
        assert same == [True, True, True, False, True, True]

    def test_the_generators_state_decides(self) -> None:
        images, layer = torch.rand(4, 1, 8, 8), Augmentation().train()
        torch.manual_seed(1)
        first = layer(images)
        torch.manual_seed(1)
        assert torch.equal(layer(images), first) and not torch.equal(layer(images), first)

    def test_each_change_is_what_it_is_called(self) -> None:
        image = torch.zeros(200, 1, 33, 33)
        image[:, :, 16, 20] = 1  # four pixels right of the middle
        rows, columns = torch.meshgrid(torch.arange(33.0), torch.arange(33.0), indexing="ij")

        def places(**settings: float | bool) -> tuple[torch.Tensor, torch.Tensor]:
            torch.manual_seed(0)
            still: dict[str, float | bool] = {"shift": 0, "degrees": 0, "scale": 0, "flip": False}
            made = Augmentation(**{**still, **settings}).train()(image)[:, 0]  # type: ignore[arg-type]
            mass = made.sum(dim=(1, 2))
            return (made * rows).sum(dim=(1, 2)) / mass - 16, (made * columns).sum(dim=(1, 2)) / mass - 16

        down, right = places()
        assert torch.allclose(down, torch.zeros(200), atol=1e-3) and torch.allclose(right, torch.full((200,), 4.0), atol=1e-3)
        down, right = places(flip=True)
        assert {round(value) for value in right.tolist()} == {-4, 4} and 60 < int((right < 0).sum()) < 140  # false alarm under 1e-7
        down, right = places(shift=0.1)
        assert down.abs().max() <= 3.3 + 0.1 and (right - 4).abs().max() <= 3.3 + 0.1 and down.std() > 1 and right.std() > 1
        down, right = places(degrees=90)
        assert torch.allclose(torch.hypot(down, right), torch.full((200,), 4.0), atol=0.8) and down.std() > 1
        down, right = places(scale=0.5)
        assert down.abs().max() < 0.1 and right.min() < 3 and right.max() > 5

    def test_p_is_the_share_that_is_changed(self) -> None:
        images = torch.rand(1, 1, 8, 8).repeat(2000, 1, 1, 1)
        torch.manual_seed(0)
        made = Augmentation(0.3).train()(images)
        share = float(((made - images).abs().amax(dim=(1, 2, 3)) > 1e-4).double().mean())
        assert abs(share - 0.3) < 6 * (0.21 / 2000) ** 0.5  # false alarm under 1e-8

    def test_settings_are_part_of_its_name(self) -> None:
        assert repr(Augmentation(shift=0.2)) != repr(Augmentation()) and isinstance(Augmentation(), torch.nn.modules.dropout._DropoutNd)
        for bad in ({"shift": 1.0}, {"degrees": 181.0}, {"scale": -0.1}):
            with pytest.raises(ConfigurationError):
                Augmentation(**bad)
        with pytest.raises(ValueError, match="probability"):
            Augmentation(1.5)


def test_a_path_to_a_device_or_a_pipe_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """A link to /dev/zero has a size of 0 and no end."""
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "real.png").write_bytes(b"x")
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    for name in ("zero.png", "pipe.png"):
        with pytest.raises(SchemaError, match="got something else"):
            path_below(tmp_path, name, endings=(".png",), source="a")
    assert path_below(tmp_path, "link.png", endings=(".png",), source="a") == tmp_path / "link.png"


def test_rows_are_named_without_tolerance_alone() -> None:
    bad = np.zeros(30, dtype=np.bool_)
    bad[[2, 28]] = True
    with pytest.raises(SchemaError, match="got 2 of 30: rows 3, 29"):
        refuse_too_many(2, 30, tolerance=0.0, source="a", bad=bad)
    with pytest.raises(SchemaError, match="got 2 of 30$|got 2 of 30;"):
        refuse_too_many(2, 30, tolerance=0.05, source="a", bad=bad)
