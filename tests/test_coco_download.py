"""Fetching archives, against a folder on this machine in place of the server."""

import hashlib
import http.server
import subprocess
import sys
import threading
import zipfile

import pytest

from dive_lib import paths
from dive_lib.coco_download import DownloadError, download, fetch, verify


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


def test_a_connection_that_ends_early_leaves_its_part(tmp_path):
    class Short(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "10")
            self.end_headers()
            self.wfile.write(b"abcd")

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Short) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        with pytest.raises(DownloadError, match="ended after 4 of 10 bytes; run the same command again to continue"):
            fetch(f"http://127.0.0.1:{served.server_port}/x.zip", tmp_path / "x.zip")
        served.shutdown()
    assert (tmp_path / "x.zip.part").read_bytes() == b"abcd" and not (tmp_path / "x.zip").exists()


def test_a_part_that_is_already_whole_is_taken(tmp_path):
    class Nothing(http.server.BaseHTTPRequestHandler):
        """A server that has nothing beyond what was fetched."""

        def do_GET(self):
            self.send_error(416)

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Nothing) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{served.server_port}/x.zip"
        with pytest.raises(DownloadError, match="x.zip.*416"):
            fetch(address, tmp_path / "x.zip")
        (tmp_path / "x.zip.part").write_bytes(b"abc")
        fetch(address, tmp_path / "x.zip")
        served.shutdown()
    assert (tmp_path / "x.zip").read_bytes() == b"abc" and not (tmp_path / "x.zip.part").exists()


def test_a_foreign_archive_is_refused(server, tmp_path):
    source, archives = server
    archives = {"val2017.zip": (*archives["val2017.zip"][:2], "train2017")}
    with pytest.raises(DownloadError, match="no folder train2017"):
        download(tmp_path / "coco", archives, source)


def test_checksum(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    verify(tmp_path / "x", "900150983cd24fb0d6963f7d28e17f72")


def test_dvc_downloads_it_when_asked_and_only_then():
    def planned(*targets):
        return subprocess.run([sys.executable, "-m", "dvc", "repro", "--dry", "--force", *targets], cwd=paths.ROOT,
                              check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout

    assert "> python -m dive_lib.coco_download downloads/coco" in planned("downloads/dvc.yaml")
    assert "coco_download" not in planned("data@paper")
