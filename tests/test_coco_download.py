"""Fetching archives, against a folder on this machine in place of the server."""

import hashlib
import zipfile

import pytest

from dive_lib.coco_download import DownloadError, download, verify


@pytest.fixture
def server(tmp_path):
    """A folder as server, and the table of its one archive."""
    place = tmp_path / "server" / "zips"
    place.mkdir(parents=True)
    with zipfile.ZipFile(place / "val2017.zip", "w") as archive:
        archive.writestr("val2017/000000000001.jpg", b"pixels")
    checksum = hashlib.md5((place / "val2017.zip").read_bytes()).hexdigest()
    return (tmp_path / "server").as_uri(), {"val2017.zip": ("zips", checksum, "val2017")}


def test_fetches_unpacks_and_does_not_fetch_twice(server, tmp_path):
    source, archives = server
    root = download(tmp_path / "coco", archives, source)
    assert (root / "val2017" / "000000000001.jpg").read_bytes() == b"pixels"
    assert not (root / "val2017.zip").exists()
    download(root, archives, "file:///nowhere")  # nothing is missing, so nothing is asked for


def test_a_damaged_archive_is_refused_and_removed(server, tmp_path):
    source, archives = server
    archives = {"val2017.zip": ("zips", "0" * 32, "val2017")}
    with pytest.raises(DownloadError, match="val2017.zip is damaged"):
        download(tmp_path / "coco", archives, source)
    assert not (tmp_path / "coco" / "val2017.zip").exists()


def test_a_missing_server_names_the_remedy(server, tmp_path):
    with pytest.raises(DownloadError, match="run the same command again"):
        download(tmp_path / "coco", server[1], (tmp_path / "nowhere").as_uri())


def test_a_foreign_archive_is_refused(server, tmp_path):
    source, archives = server
    archives = {"val2017.zip": (*archives["val2017.zip"][:2], "train2017")}
    with pytest.raises(DownloadError, match="no folder train2017"):
        download(tmp_path / "coco", archives, source)


def test_checksum(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    verify(tmp_path / "x", "900150983cd24fb0d6963f7d28e17f72")
