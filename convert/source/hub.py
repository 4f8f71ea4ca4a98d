"""Opens a checkpoint on the Hugging Face hub; huggingface_hub resolves names, commits, tokens and small files.

Input: a hub id. Output: `Repository`: the folder of huggingface_hub's cache with the small files, the names of all
files, and each safetensors file as a `Source` that is read in ranges. HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE
and similar variables have the same meaning as in huggingface_hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import urljoin

from kimi_gguf.convert.errors import ConvertError, ReadError
from kimi_gguf.convert.source.byte_source import LocalFile, Source
from kimi_gguf.convert.source.json_file import MAX_BYTES
from kimi_gguf.convert.source.origin import COMMIT
from kimi_gguf.convert.source.read_ahead import ReadAhead
from kimi_gguf.convert.source.remote import (
    PASSING,
    Location,
    PassingError,
    RemoteFile,
    Web,
    reason,
    retry_after,
)

PREFIX: Final = "hf://"
LIBRARY: Final = "kimi-gguf"  # how requests name themselves
_NAME: Final = r"[A-Za-z0-9][\w.-]{0,95}"
_HUB_ID: Final = re.compile(rf"(hf://)?({_NAME}/{_NAME})(?:@([^\s@\\]{{1,200}}))?", re.ASCII)
_FILES: Final = (".safetensors", ".json", ".gguf", ".bin", ".pt", ".pth")  # rather a path that is mistyped
_TOKEN: Final = "a token that may read it: HF_TOKEN, or `hf auth login`"


@dataclass(frozen=True)
class HubId:
    """OWNER/NAME and a revision: branch, tag or commit."""

    repository: str
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """The id in `[hf://]OWNER/NAME[@REVISION]`; None where there is none."""
        match = _HUB_ID.fullmatch(text)
        if match is None or (not match[1] and match[2].endswith(_FILES)):
            return None
        return cls(match[2], match[3] or "main")

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}@{self.revision}"


class HubPath(PurePosixPath):
    """What errors call a file on the hub: hf://OWNER/NAME@COMMIT/FILE."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)


@dataclass(frozen=True)
class Repository:
    """A repository at one commit; made by `open_repository`."""

    id: HubId
    commit: str
    folder: Path  # where the small files are
    names: frozenset[str]  # of all files
    web: Web
    ahead: ReadAhead[RemoteFile]

    @property
    def path(self) -> HubPath:
        return HubPath("hf:", *f"{self.id.repository}@{self.commit[:12]}".split("/"))

    def open(self, name: str) -> Source:
        """The file `name`, from the cache if it is there whole. Raises `ConvertError`, `ReadError`."""
        if (cached := self.folder / name).is_file():
            return LocalFile(cached)
        if name not in self.names:
            raise ConvertError(f"{self.path / name}: not found; the checkpoint on the hub is incomplete")
        return RemoteFile(self.path / name, self.web, lambda: self._locate(name), self.ahead)

    def _locate(self, name: str) -> Location:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self.id.repository, name, revision=self.commit, endpoint=self.web.hub)
        with _asking(str(self.path / name), self.web):
            found = get_hf_file_metadata(url, library_name=LIBRARY)
        if found.size is None or not found.etag:
            raise ReadError(f"{self.path / name}: {self.web.hub} tells neither its size nor its ETag")
        return Location(urljoin(url, found.location), found.commit_hash or "", found.etag, found.size)


def open_repository(id: HubId, small: Sequence[str]) -> Repository:
    """Find the commit, and fetch those of the files `small` that are there into huggingface_hub's cache.

    Raises `ConvertError` where there is no such repository, revision or access, `ReadError` where the hub does not
    answer, or not as it should.
    """
    web = _web_for(id)
    info = web.persistently(str(id), lambda: _model_info(id, web))
    commit, sizes = info.sha or "", {file.rfilename: file.size for file in info.siblings or ()}
    if not COMMIT.fullmatch(commit) or (COMMIT.fullmatch(id.revision) and commit != id.revision):
        raise ReadError(f"{id}: {web.hub} answers with the commit {commit!r:.60}; expected the one asked for")
    paths: list[Path] = []
    for name in (name for name in small if name in sizes):
        if (sizes[name] or 0) > MAX_BYTES:
            raise ConvertError(f"{id}: {name}: expected a small file, found {sizes[name]:,} bytes")
        path = web.persistently(f"{id}: {name}", partial(_download, id, commit, name, web))
        paths.append(path)
    if not paths:
        raise ConvertError(f"{id}: holds none of {', '.join(small)}; expected a checkpoint in safetensors")
    ahead: ReadAhead[RemoteFile] = ReadAhead(RemoteFile.fetch, web.stopped, web.stop)
    return Repository(id, commit, paths[0].parent, frozenset(sizes), web, ahead)


def is_offline(id: HubId) -> bool:
    """Whether huggingface_hub is told to stay away from the network (HF_HUB_OFFLINE)."""
    return bool(_library(id).constants.HF_HUB_OFFLINE)


def cached_folder(id: HubId) -> Path:
    """Where the cache holds the revision; nothing is asked of the hub. Raises `ConvertError` if it does not."""
    hub = _library(id)
    try:
        return Path(hub.snapshot_download(id.repository, revision=id.revision, local_files_only=True))
    except (FileNotFoundError, ValueError):
        raise ConvertError(
            f"{id}: not in the cache {hub.constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to ask the hub; "
            "download it first, or go online"
        ) from None


def _library(id: HubId | None) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise ConvertError(
            f"{id or PREFIX}: reading from the hub needs huggingface_hub: pip install 'kimi-gguf[hub]'; or download "
            "the checkpoint and give its folder"
        ) from None
    return huggingface_hub


def _web_for(id: HubId) -> Web:
    hub = _library(id)
    headers = hub.utils.build_hf_headers(library_name=LIBRARY)
    # Its HTTP client's base error: httpx's or httpx2's, as the release goes.
    return Web(hub.utils.get_session(), hub.errors.HTTPError, hub.constants.ENDPOINT, headers)


def _model_info(id: HubId, web: Web) -> Any:
    with _asking(str(id), web):
        api = _library(id).HfApi(endpoint=web.hub, library_name=LIBRARY)
        return api.model_info(id.repository, revision=id.revision, files_metadata=True, timeout=30)


def _download(id: HubId, commit: str, name: str, web: Web) -> Path:
    hub = _library(id)
    shown = not hub.utils.are_progress_bars_disabled()
    hub.utils.disable_progress_bars()
    try:
        with _asking(f"{id}: {name}", web):
            found = hub.hf_hub_download(
                id.repository, name, revision=commit, endpoint=web.hub, library_name=LIBRARY
            )
            return Path(found)
    finally:
        if shown:
            hub.utils.enable_progress_bars()


@contextmanager
def _asking(what: str, web: Web) -> Iterator[None]:
    """huggingface_hub's errors as ours: what another try may mend, what the user can, what nobody here can."""
    errors = _library(None).errors
    refusals = (
        (errors.GatedRepoError, f"is gated: accept its conditions at {web.hub}, then give {_TOKEN}"),
        (
            errors.RepositoryNotFoundError,
            f"{web.hub} has no such repository, or a private one, and no such folder is here; look at the name, or "
            f"give {_TOKEN}",
        ),
        (errors.RevisionNotFoundError, "has no such revision; name a branch, a tag or a commit after the @"),
        (errors.RemoteEntryNotFoundError, "not found; the checkpoint on the hub is incomplete"),
        (errors.HFValidationError, "is no id of a repository; expected OWNER/NAME"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE forbids to ask the hub"),
    )
    try:
        yield
    except errors.LocalEntryNotFoundError as error:  # what hf_hub_download makes of a failed request
        status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
        raise PassingError(
            f"{web.hub} answers {status}" if status else f"{web.hub} cannot be reached"
        ) from None
    except tuple(kind for kind, _ in refusals) as error:
        text = next(text for kind, text in refusals if isinstance(error, kind))
        raise ConvertError(f"{what}: {text}") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in PASSING:
            wait = retry_after(error.response.headers.get("Retry-After", ""))
            raise PassingError(f"{web.hub} answers {status}", wait) from None
        todo = f"give {_TOKEN}" if status in {401, 403} else "try again later"
        raise ReadError(f"{what}: {web.hub} answers {status}; {todo}") from None
    except web.failures as error:
        if type(error).__name__ in {"TooManyRedirects", "UnsupportedProtocol"}:
            raise ReadError(f"{what}: {web.hub}: {reason(error)}; look to HF_ENDPOINT") from None
        raise PassingError(f"{web.hub} cannot be reached ({reason(error)})") from None
    except OSError as error:
        raise ConvertError(f"{what}: cannot be fetched into the cache: {reason(error)}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ReadError(
            f"{what}: {web.hub} gives an answer that huggingface_hub does not read: {reason(error)}"
        ) from None
