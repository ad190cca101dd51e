"""Fetches COCO 2017 into a folder in COCO's format, when the user wants that; about 25 GB on disk.

    python -m dive_lib.coco_download downloads/coco

An interrupted download continues, a damaged archive is refused by its checksum, and what is there already is not
fetched again. Only the `paper` profile needs it.
"""

import argparse
import hashlib
import os
import urllib.request
import zipfile
from pathlib import Path

from dive_lib.progress import Progress

SOURCE = "http://images.cocodataset.org"
ARCHIVES = {
    "annotations_trainval2017.zip": ("annotations", "f4bbac642086de4f52a3fdda2de5fa2c", "annotations"),
    "val2017.zip": ("zips", "442b8da7639aecaf257c1dceb8ba8c80", "val2017"),
    "train2017.zip": ("zips", "cced6f7f71b7629ddf16f17bbcfab6b2", "train2017"),
}
"""Archive -> (folder on the server, MD5 checksum, folder that it unpacks to)."""
BLOCK = 1 << 20


class DownloadError(RuntimeError):
    """An archive could not be fetched or is damaged; the message names it and the remedy."""


def download(root: Path | str, archives: dict | None = None, source: str = SOURCE) -> Path:
    """Fetches, checks and unpacks the archives into `root`; folders that are complete are left alone."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    for name, (place, checksum, folder) in (archives or ARCHIVES).items():
        complete = root / f".{folder}.complete"
        if complete.exists():
            continue
        archive = root / name
        fetch(f"{source}/{place}/{name}", archive)
        verify(archive, checksum)
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(root)
        if not (root / folder).is_dir():
            raise DownloadError(f"{name} holds no folder {folder}; the archive is not COCO 2017's")
        complete.touch()
        archive.unlink()
    return root


def fetch(address: str, path: Path) -> None:
    """Downloads to `path` by way of `<path>.part`, which a later call continues."""
    if path.exists():
        return
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            continues = response.status == 206
            total = int(response.headers.get("Content-Length", 0)) + (have if continues else 0)
            with open(part, "ab" if continues else "wb") as file, \
                    Progress(max(total, have), path.name, unit="bytes", start=have if continues else 0) as progress:
                while block := response.read(BLOCK):
                    file.write(block)
                    progress.update(len(block))
        if part.stat().st_size < total:  # closed early, which is no error to the reader
            raise OSError(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")
    except OSError as error:
        if have and getattr(error, "code", None) == 416:  # nothing follows: an earlier call had fetched it all
            os.replace(part, path)
            return
        raise DownloadError(f"{path.name}: {error}; run the same command again to continue, or fetch {address} by "
                            f"other means and put it at {path}") from None
    os.replace(part, path)


def verify(path: Path, checksum: str) -> None:
    """Raises DownloadError, and removes the file, if its MD5 checksum is another."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    if digest.hexdigest() != checksum:
        path.unlink()
        raise DownloadError(f"{path.name} is damaged (checksum {digest.hexdigest()}, expected {checksum}) and has been "
                            "removed; run the same command again")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetches COCO 2017 (about 25 GB).")
    parser.add_argument("root", type=Path, help="folder to fill, as `paper.data.root` in params.yaml names it")
    download(parser.parse_args().root)


if __name__ == "__main__":
    main()
