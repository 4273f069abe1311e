"""Members come out of archives whole, and nothing else does."""

import tarfile
import zipfile
from pathlib import Path

import pytest
from data_archives import make_tar, make_zip

from pipeline.data.archives import extract
from pipeline.errors import UsageError


def test_a_file_in_an_archive_in_an_archive_is_found(tmp_path: Path) -> None:
    inner = make_tar(tmp_path / "inner.tar.gz", {"folder/data.txt": b"rows\r\n"})
    outer = make_zip(tmp_path / "outer.zip", {"a/inner.tar.gz": inner.read_bytes()})
    extract(outer, ["a/inner.tar.gz", "folder/data.txt"], tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_bytes() == b"rows\r\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inner.tar.gz", "out.txt", "outer.zip"], "no scratch files stay"


def test_a_member_that_is_not_there_is_named_with_the_nearest(tmp_path: Path) -> None:
    for archive in (make_zip(tmp_path / "a.zip", {"data/train.csv": b"x"}), make_tar(tmp_path / "a.tar.gz", {"data/train.csv": b"x"})):
        with pytest.raises(UsageError, match=r"no 'data/trian.csv' in it.*data/train.csv"):
            extract(archive, ["data/trian.csv"], tmp_path / "out")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE])
def test_links_folders_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("trap")
    info.type, info.linkname = kind, "real"
    archive = make_tar(tmp_path / "a.tar.gz", {"real": b"x"}, [info])
    with pytest.raises(UsageError, match="must name a plain file"):
        extract(archive, ["trap"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        info = zipfile.ZipInfo("trap")
        info.external_attr = 0o120777 << 16
        file.writestr(info, "/etc/passwd")
    with pytest.raises(UsageError, match="a link"):
        extract(path, ["trap"], tmp_path / "out")


def test_a_member_far_larger_than_its_archive_is_refused(tmp_path: Path) -> None:
    bomb = b"\0" * 5_000_000
    for archive in (make_zip(tmp_path / "a.zip", {"bomb": bomb}), make_tar(tmp_path / "a.tar.gz", {"bomb": bomb})):
        with pytest.raises(UsageError, match="refused as unsafe"):
            extract(archive, ["bomb"], tmp_path / "out")


def test_a_file_that_is_no_archive_and_a_broken_one_are_named(tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("text")
    with pytest.raises(UsageError, match=r"plain\.txt: neither a zip nor a tar"):
        extract(plain, ["x"], tmp_path / "out")
    broken = make_tar(tmp_path / "a.tar.gz", {"data": bytes(range(256)) * 400})
    broken.write_bytes(broken.read_bytes()[:-200])
    with pytest.raises(UsageError, match="cannot be read as an archive"):
        extract(broken, ["data"], tmp_path / "out")
