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
from kimi_gguf.convert.source import remote
from kimi_gguf.convert.source.byte_source import LocalFile, Source
from kimi_gguf.convert.source.json_file import MAX_BYTES, MAX_INDEX_BYTES
from kimi_gguf.convert.source.origin import COMMIT
from kimi_gguf.convert.source.read_ahead import ReadAhead
from kimi_gguf.convert.source.remote import Location, PassingError, RemoteFile, Web, reason
from kimi_gguf.engine.errors import install

PREFIX: Final = "hf://"
LIBRARY: Final = "kimi-gguf"  # the user agent of requests
_NAME: Final = r"[A-Za-z0-9][\w.-]{0,95}"
_HUB_ID: Final = re.compile(rf"(hf://)?({_NAME}/{_NAME})(?:@([^\s@\\]{{1,200}}))?", re.ASCII)
_FILES: Final = (".safetensors", ".json", ".gguf", ".bin", ".pt", ".pth")  # more likely a mistyped path
_TOKEN: Final = "give a token with access: HF_TOKEN, or `hf auth login`"


@dataclass(frozen=True)
class HubId:
    """OWNER/NAME and a revision: branch, tag or commit."""

    repository: str
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """The id in `[hf://]OWNER/NAME[@REVISION]`; None if there is none."""
        match = _HUB_ID.fullmatch(text)
        if match is None or (not match[1] and match[2].endswith(_FILES)):
            return None
        return cls(match[2], match[3] or "main")

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}@{self.revision}"


class HubPath(PurePosixPath):
    """A file on the hub in errors: hf://OWNER/NAME@COMMIT/FILE."""

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
        """The file `name`, from the cache if it is there. Raises `ConvertError`, `ReadError`."""
        if (cached := self.folder / name).is_file():
            return LocalFile(cached)
        if name not in self.names:
            raise ConvertError(
                f"{self.path / name}: not found", todo="the checkpoint on the hub is incomplete"
            )
        return RemoteFile(self.path / name, self.web, lambda: self._locate(name), self.ahead)

    def _locate(self, name: str) -> Location:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self.id.repository, name, revision=self.commit, endpoint=self.web.hub)
        with _translated_errors(str(self.path / name), self.web):
            found = get_hf_file_metadata(url, library_name=LIBRARY)
        if found.size is None or not found.etag:
            facts = f"{found.size} and {found.etag!r:.60}"
            raise ReadError(f"{self.path / name}: {self.web.hub}", expected="size and ETag", found=facts)
        return Location(urljoin(url, found.location), found.commit_hash or "", found.etag, found.size)


def open_repository(id: HubId, small: Sequence[str]) -> Repository:
    """Find the commit, and download the files `small` that exist to huggingface_hub's cache.

    Raises `ConvertError` if the repository or revision does not exist or is not accessible, `ReadError` if the hub
    does not answer or its answer is invalid.
    """
    web = _web_for(id)
    info = web.persistently(str(id), lambda: _model_info(id, web))
    commit, sizes = info.sha or "", {file.rfilename: file.size for file in info.siblings or ()}
    if not COMMIT.fullmatch(commit) or (COMMIT.fullmatch(id.revision) and commit != id.revision):
        raise ReadError(f"{id}: {web.hub}", expected="the commit of the revision", found=f"{commit!r:.60}")
    paths: list[Path] = []
    for name in (name for name in small if name in sizes):
        if (sizes[name] or 0) > (MAX_INDEX_BYTES if name.endswith(".index.json") else MAX_BYTES):
            raise ConvertError(f"{id}: {name}", expected="a small file", found=f"{sizes[name]:,} bytes")
        paths.append(web.persistently(f"{id}: {name}", partial(_download, id, commit, name, web)))
    if not paths:
        raise ConvertError(
            f"{id}: has none of {', '.join(small)}", todo="expected a checkpoint in safetensors"
        )
    ahead: ReadAhead[RemoteFile] = ReadAhead(RemoteFile.fetch, web.stopped, web.stop)
    return Repository(id, commit, paths[0].parent, frozenset(sizes), web, ahead)


def is_offline(id: HubId) -> bool:
    """Whether huggingface_hub must not use the network (HF_HUB_OFFLINE)."""
    return bool(_library(id).constants.HF_HUB_OFFLINE)


def cached_folder(id: HubId) -> Path:
    """The folder of the revision in the cache; sends no request. Raises `ConvertError` if there is none."""
    hub = _library(id)
    try:
        return Path(hub.snapshot_download(id.repository, revision=id.revision, local_files_only=True))
    except (FileNotFoundError, ValueError):
        raise ConvertError(
            f"{id}: not in the cache {hub.constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids "
            "requests to the hub",
            todo="download it first, or unset HF_HUB_OFFLINE",
        ) from None


def _library(id: HubId | None) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise ConvertError(
            f"{id or PREFIX}: reading from the hub requires huggingface_hub: {install('huggingface_hub')}",
            todo="or download the checkpoint and give its folder",
        ) from None
    return huggingface_hub


def _web_for(id: HubId) -> Web:
    hub = _library(id)
    headers = hub.utils.build_hf_headers(library_name=LIBRARY)
    # The base error of its HTTP client, which is httpx or httpx2, depending on the release.
    return Web(hub.utils.get_session(), hub.errors.HTTPError, hub.constants.ENDPOINT, headers)


def _model_info(id: HubId, web: Web) -> Any:
    with _translated_errors(str(id), web):
        api = _library(id).HfApi(endpoint=web.hub, library_name=LIBRARY)
        return api.model_info(id.repository, revision=id.revision, files_metadata=True, timeout=30)


def _download(id: HubId, commit: str, name: str, web: Web) -> Path:
    hub = _library(id)
    shown = not hub.utils.are_progress_bars_disabled()
    hub.utils.disable_progress_bars()
    try:
        with _translated_errors(f"{id}: {name}", web):
            options = {"revision": commit, "endpoint": web.hub, "library_name": LIBRARY}
            return Path(hub.hf_hub_download(id.repository, name, **options))
    finally:
        if shown:
            hub.utils.enable_progress_bars()


@contextmanager
def _translated_errors(what: str, web: Web) -> Iterator[None]:
    """Turn huggingface_hub's errors into `PassingError` if another attempt may succeed, `ConvertError` if the user can
    correct it, and `ReadError` otherwise."""
    errors = _library(None).errors
    refusals = (
        (errors.GatedRepoError, f"is gated: accept its conditions at {web.hub}, then {_TOKEN}"),
        (
            errors.RepositoryNotFoundError,
            f"{web.hub} has no such repository, or it is private; check the name, or {_TOKEN}",
        ),
        (errors.RevisionNotFoundError, "no such revision; give a branch, a tag or a commit after the @"),
        (errors.RemoteEntryNotFoundError, "not found; the checkpoint on the hub is incomplete"),
        (errors.HFValidationError, "not the id of a repository; expected OWNER/NAME"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE forbids requests to the hub"),
    )
    try:
        yield
    except errors.LocalEntryNotFoundError as error:  # raised by hf_hub_download for a failed request
        status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
        answer = f"answers {status}" if status else "cannot be reached"
        raise PassingError(f"{web.hub} {answer}") from None
    except tuple(kind for kind, _ in refusals) as error:
        text = next(text for kind, text in refusals if isinstance(error, kind))
        raise ConvertError(f"{what}: {text}") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in remote.PASSING:
            wait = remote.retry_after(error.response.headers.get("Retry-After", ""))
            raise PassingError(f"{web.hub} answers {status}", wait) from None
        todo = _TOKEN if status in {401, 403} else "try again later"
        raise ReadError(f"{what}: {web.hub} answers {status}", todo=todo) from None
    except web.failures as error:
        if type(error).__name__ in {"TooManyRedirects", "UnsupportedProtocol"}:
            raise ReadError(f"{what}: {web.hub}: {reason(error)}", todo="check HF_ENDPOINT") from None
        raise PassingError(f"{web.hub} cannot be reached ({reason(error)})") from None
    except OSError as error:
        raise ConvertError(f"{what}: cannot be downloaded to the cache: {reason(error)}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ReadError(
            f"{what}: {web.hub}: huggingface_hub cannot read the answer: {reason(error)}"
        ) from None
