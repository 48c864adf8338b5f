"""Files of the Hugging Face hub: cached ones without a request, others downloaded and verified."""

from __future__ import annotations

import hashlib
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from imbvlm.base.errors import ImbvlmError, end_sentence
from imbvlm.config.encoder_entries import published_name

_PROBE_SECONDS = 10.0
# The name of a large file in the cache is its hash; small ones have git's.
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HubFile:
    """A file of a hub repository at a revision; of several `names` the first one counts that the repository has."""

    repository: str
    names: tuple[str, ...]
    revision: str = constants.DEFAULT_REVISION

    def __str__(self) -> str:
        revision = "" if self.revision == constants.DEFAULT_REVISION else f"@{self.revision}"
        return f"{' or '.join(self.names)} of {self.repository}{revision}"

    @property
    def address(self) -> str:
        """The repository's page."""
        return f"{constants.ENDPOINT}/{self.repository}"

    @property
    def can_run_code(self) -> bool:
        """Whether a file that is read here could be something else than safetensors or JSON."""
        return not all(name.endswith((".safetensors", ".json")) for name in self.names)

    def cached(self) -> str | None:
        """Its path on this machine, None without it; asks no server, which takes a minute where there is no network."""
        paths = (
            huggingface_hub.try_to_load_from_cache(self.repository, name, revision=self.revision) for name in self.names
        )
        return next((path for path in paths if isinstance(path, str)), None)

    def fetch(self, encoder: str) -> str:
        """Its path, downloaded unless it is cached; `encoder` needs it. Raises ImbvlmError with the cause and a fix."""
        for name in self.names:
            cached = huggingface_hub.try_to_load_from_cache(self.repository, name, revision=self.revision)
            if isinstance(cached, str):
                return cached
            if cached is not huggingface_hub._CACHED_NO_EXIST:
                break
        cause = unreachable(self.address)
        if cause is not None:
            path = self.cached()
            if path is None:
                raise ImbvlmError(offline_sentence(encoder, [self], self.address, cause))
            return path
        paths = (self.fetch_alternative(name, encoder) for name in self.names)
        path = next((path for path in paths if path is not None), None)
        if path is None:
            only = "" if self.can_run_code else " Files of other kinds aren't read, since they may run code."
            raise ImbvlmError(
                f"{encoder} needs {self}, and the repository has no such file.{only} Choose another encoder."
            )
        return path

    def fetch_alternative(self, name: str, encoder: str) -> str | None:
        """The path of a file of the same repository and revision, downloaded unless cached; None where it has none."""
        needs = f"{encoder} needs {name} of {self.repository}"
        try:
            return _download(self.repository, name, self.revision)
        except LocalEntryNotFoundError as error:
            cause = str(error.__cause__ or error).splitlines()[0]
            raise ImbvlmError(offline_sentence(encoder, [self], self.address, _no_answer(cause))) from None
        except EntryNotFoundError:
            return None
        except _DamagedError:
            raise ImbvlmError(
                f"{needs}, and the bytes that {constants.ENDPOINT} sent have another hash than it states. They were "
                "removed; try again, and check HF_ENDPOINT and proxies if it stays."
            ) from None
        except GatedRepoError:
            raise ImbvlmError(
                f"{needs}, and access to that repository is gated. Accept its terms at {self.address} {_token_fix()}."
            ) from None
        except RepositoryNotFoundError:
            raise ImbvlmError(
                f"{needs}, and the hub has no such repository, or it is private. Check the name at {self.address}; for "
                f"a private one ask for access {_token_fix()}."
            ) from None
        except RevisionNotFoundError:
            raise ImbvlmError(
                f"{needs} at {self.revision}, and the repository has no such revision. Name a branch, a tag or a "
                f"commit of {self.address}/commits/main."
            ) from None
        except Exception as error:  # noqa: BLE001
            # huggingface_hub raises what its HTTP library raises, which differs between its versions.
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise ImbvlmError(
                f"{needs}, and its download from {constants.ENDPOINT} failed: {end_sentence(line)} Start it again; "
                "nothing of an incomplete file is used."
            ) from None


class _DamagedError(Exception):
    """A downloaded file hasn't the hash that the hub states."""


def unreachable(address: str) -> str | None:
    """The end of a sentence about a server that can't be reached, with the cause; None where it answers with anything.

    Takes seconds, and doesn't retry.
    """
    if constants.HF_HUB_OFFLINE:
        return "was not asked, since HF_HUB_OFFLINE is set"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_PROBE_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None
    except urllib.error.URLError as error:
        return _no_answer(error.reason)
    except (OSError, ValueError) as error:
        return _no_answer(error)


def fetch_command(encoder: str) -> str:
    """The command that writes an encoder into a folder, to be carried to a machine without a network."""
    return f"imbvlm encoder fetch {published_name(encoder)} -o DIR"


def offline_sentence(encoder: str, files: Sequence[HubFile], address: str, cause: str) -> str:
    """Which files of an encoder are missing, `unreachable`'s cause, and both ways to bring them here."""
    folders = dict.fromkeys(f"models--{file.repository.replace('/', '--')}" for file in files)
    return (
        f"{encoder} needs {'; '.join(map(str, files))}, not cached here, and {address} {cause}. "
        f"Where there is a network run `{fetch_command(encoder)}`, copy DIR here, and set encoder.name: "
        f"local-dir:DIR. Or copy {' and '.join(folders)} of that machine's cache to {constants.HF_HUB_CACHE} "
        "(HF_HOME sets another place; HF_HUB_OFFLINE=1 then asks no server). Behind a mirror or a proxy set "
        "HF_ENDPOINT or HTTPS_PROXY."
    )


def _download(repository: str, name: str, revision: str) -> str:
    """Download a file into the cache; raises what huggingface_hub raises, and _DamagedError."""
    path = huggingface_hub.hf_hub_download(repository, name, revision=revision)
    blob = Path(path).resolve()
    if _SHA256.fullmatch(blob.name):
        with blob.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != blob.name:
            blob.unlink()
            Path(path).unlink(missing_ok=True)
            raise _DamagedError
    return path


def _no_answer(reason: object) -> str:
    return f"doesn't answer ({reason})"


def _token_fix() -> str:
    if huggingface_hub.get_token():
        return "with the account of the present token, or set HF_TOKEN to another account's"
    return "and give that account's token: `hf auth login`, or HF_TOKEN"
