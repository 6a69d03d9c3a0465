"""Downloads and unpacks archives: complete or not at all, and checked."""

import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
from fsspec.callbacks import TqdmCallback
from torchvision.datasets.utils import calculate_md5

from clipn.runtime.files import atomic_write, extract_tar

_TIMEOUT = 60.0  # seconds that a download may stall


def fetch(path: Path, url: str, md5: str | None = None) -> None:
    """Download a file, unless it is there. Raises OSError for a failure, ValueError for another MD5."""
    if path.is_file():
        check_md5(path, md5, path)
    else:
        download(url, path, md5)


def download(url: str, path: Path, md5: str | None = None) -> None:
    """Download a file, complete or not at all. Raises OSError, or ValueError for another MD5.

    torchvision's download_url has no time limit, takes a file that ends early, and falls back from https to http.
    """
    options = {
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT, sock_read=_TIMEOUT),
        "headers": {"User-Agent": "Mozilla/5.0 (CLIPN)", "Accept-Encoding": "identity"},
        "auto_decompress": False,
        "trust_env": True,  # proxies
    }
    bar = TqdmCallback({"unit": "B", "unit_scale": True, "desc": path.name, "disable": None})
    with atomic_write(path) as file, bar:
        try:
            files, name = fsspec.core.url_to_fs(url, client_kwargs=options)
            files.get_file(name, file, callback=bar)
            file.flush()
        except FileNotFoundError as error:
            raise OSError(f"{url}: no such file") from error
        except Exception as error:  # aiohttp and fsspec raise many kinds
            raise OSError(f"{url}: {str(error) or type(error).__name__}") from error
        check_md5(file.name, md5, url)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar or zip file. Raises ValueError for a broken one, or one with a path outside of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as content:
                for member in content.namelist():
                    if not (folder / member).resolve().is_relative_to(folder.resolve()):
                        raise ValueError(f"{archive}: {member!r} would be unpacked outside of {folder}")
                content.extractall(folder)
        else:
            with tarfile.open(archive) as content:
                extract_tar(content, folder)
        shutil.rmtree(folder / "__MACOSX", ignore_errors=True)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{archive}: not a complete tar or zip file, delete it and run this again: {error}") from error


def check_md5(path: str | Path, md5: str | None, source: Any) -> None:
    if md5 and (actual := calculate_md5(path)) != md5:
        raise ValueError(f"{source}: not the published file: its MD5 is {actual}, expected {md5}")
