"""Puts a checkpoint folder on the Hub: all of what belongs there, in one commit, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hfcompress.errors import CheckpointError, ConfigError, HFCompressError, HubError, Problem
from hfcompress.publishing.contents import WEIGHTS, Content, collect, find_secret

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.hf_api import RepoFile

T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0, 8.0)
_LONGEST_WAIT = 60.0
_OVERLOADED = frozenset({429})
_TRANSIENT = _OVERLOADED | frozenset(range(500, 600))


def push(
    directory: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Uploads a checkpoint folder: weights, config, tokenizer, card, report and pictures.

    The token is the one that `hf auth login` (or the Hub's own environment variable) left; it cannot
    be given here, so that it ends up in no recipe and no shell history. A second push of the same
    files makes no commit.

    Args:
        directory: A folder with config.json, safetensors weights and a README.md.
        repo_id: `ORG/NAME`; the repository is made where it does not exist.
        private: Make it a private one. An existing public one is refused, not made private.
        revision: The branch, made where it does not exist; the main one by default.
        create_pr: Open a pull request on an existing repository instead of writing to it.
        tag: A name for the commit, such as `v1.0`. A tag that names another commit is never moved.
        commit_message: The commit's first line.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        CheckpointError: The folder is no whole checkpoint, or holds what must not be uploaded.
        ConfigError: The repository's name or the message cannot be used.
        HubError: The Hub refused, or could not be reached.
    """
    _check_arguments(repo_id, revision, create_pr, tag, commit_message)
    contents = collect(Path(directory))
    require_login()
    from huggingface_hub import HfApi

    upload = Upload(
        api=HfApi(),
        repo_id=repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        tag=tag,
        message=commit_message or "Upload a model compressed with hfcompress",
    )
    return upload.send(contents)


def require_login() -> None:
    """Refuses to go on without a login that can be tried.

    Raises:
        HubError: There is no token.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise HubError("you are not logged in to the Hub", hint="log in with `hf auth login`")


@dataclass(frozen=True, kw_only=True)
class Upload:
    """One upload to one repository.

    Attributes:
        api: The Hub.
        repo_id: `ORG/NAME`.
        private: Whether the repository must be private.
        revision: The branch; the main one if None.
        create_pr: Whether to open a pull request.
        tag: A name for the commit, or None.
        message: The commit's first line.
        waits: Seconds between the tries where the Hub is overloaded or cannot be reached.
    """

    api: HfApi
    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    tag: str | None = None
    message: str = "Upload model"
    waits: Sequence[float] = WAITS

    def send(self, contents: Sequence[Content]) -> str:
        """Brings the repository to hold `contents`, and returns the address of what was written.

        Raises:
            CheckpointError: The Hub does not accept the card's metadata.
            HubError: It refused, kept failing, or somebody else committed meanwhile.
        """
        import httpx2  # what huggingface_hub speaks through; it does not wrap failures to connect

        try:
            self._prepare_repository()
            url, commit = self._commit(contents)
            if self.tag is not None:
                name = self.tag
                self._patiently(lambda: self.api.create_tag(self.repo_id, tag=name, revision=commit, exist_ok=True))
            return url
        except HFCompressError:
            raise
        # The rest are: answers and failed connections (HTTPError), offline mode (OSError), what
        # huggingface_hub wraps uploads of large files in, and answers that lack what they should hold.
        except (httpx2.HTTPError, OSError, RuntimeError, ValueError, KeyError) as error:
            raise self._explain(error) from error

    def _prepare_repository(self) -> None:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = self._patiently(lambda: self.api.repo_info(self.repo_id))
        except RepositoryNotFoundError as error:
            # A refused login looks the same to huggingface_hub, and must make no repository. A pull request needs
            # one that is there, which may be somebody else's.
            if self.create_pr or _status(error) != 404:
                raise
            # None leaves the choice to the organization: its default may be private.
            private = self.private or None
            self._patiently(lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True))
            info = self._patiently(lambda: self.api.repo_info(self.repo_id))
        if self.private and not info.private:
            raise HubError(
                f"{self.repo_id} exists and is public; nothing was uploaded",
                hint="make it private in its settings on the Hub, or push to another name",
            )
        if self.revision is not None and not self.create_pr:
            branch = self.revision
            self._patiently(lambda: self.api.create_branch(self.repo_id, branch=branch, exist_ok=True))

    def _commit(self, contents: Sequence[Content]) -> tuple[str, str]:
        """Returns the address of what was written, and the commit."""
        first = self._patiently(self._head)
        tagged = self._patiently(self._tagged)

        def attempt() -> tuple[str, str]:
            # Read again at every try: a commit whose answer was lost on the way is there already.
            head = self._head()
            operations = self._operations(contents, head)
            if tagged is not None and (operations or tagged != head):
                raise HubError(
                    f"{self.repo_id} has a tag {self.tag}, which names another commit; nothing was committed",
                    hint="choose another tag, or delete that one on the Hub",
                )
            if not operations:
                return f"{self.api.endpoint}/{self.repo_id}/commit/{head}", head
            if head != first:
                raise self._newer()
            done = self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=self.message,
                revision=self.revision,
                create_pr=self.create_pr,
                parent_commit=head,
            )
            self._verify(contents, done.oid)
            return str(done.pr_url if self.create_pr else done.commit_url), done.oid

        # A pull request whose answer was lost cannot be recognised: trying again could open a second.
        return self._patiently(attempt, on=_OVERLOADED if self.create_pr else _TRANSIENT)

    def _head(self) -> str:
        sha = self.api.repo_info(self.repo_id, revision=self.revision).sha
        if not sha:
            raise HubError(f"the Hub names no commit of {self.repo_id}")
        return sha

    def _tagged(self) -> str | None:
        """Returns the commit that the tag names already."""
        if self.tag is None:
            return None
        tags = self.api.list_repo_refs(self.repo_id).tags
        return next((each.target_commit for each in tags if each.name == self.tag), None)

    def _operations(self, contents: Sequence[Content], head: str) -> list[CommitOperationAdd | CommitOperationDelete]:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        there = self._files(head)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path_in_repo=content.name, path_or_fileobj=content.path)
            for content in contents
            if not _same(content, there.get(content.name))
        ]
        # Weights of an earlier push must go: model.safetensors would be loaded before new shards.
        names = {content.name for content in contents}
        stale = [name for name in there if WEIGHTS.fullmatch(name) and name not in names]
        return operations + [CommitOperationDelete(path_in_repo=name) for name in sorted(stale)]

    def _files(self, commit: str) -> dict[str, RepoFile]:
        from huggingface_hub.hf_api import RepoFile

        tree = self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def _verify(self, contents: Sequence[Content], commit: str) -> None:
        there = self._files(commit)
        missing = [content.name for content in contents if not _same(content, there.get(content.name))]
        if missing:
            raise HubError(
                f"{self.repo_id} does not hold what was read from {', '.join(missing)} (commit {commit[:7]})",
                hint="look for these names in its .gitignore; change no file during a push; then push again",
            )

    def _patiently(self, call: Callable[[], T], *, on: frozenset[int] = _TRANSIENT) -> T:
        import httpx2

        for wait in self.waits:
            try:
                return call()
            except (httpx2.HTTPError, RuntimeError) as error:
                if not _passes(error, on):
                    raise
                time.sleep(_asked_wait(error, wait))
        return call()

    def _newer(self) -> HubError:
        return HubError(
            f"{self.repo_id} got a newer commit meanwhile; nothing was committed",
            hint="look at that commit, then push again",
        )

    def _explain(self, error: Exception) -> HFCompressError:
        status = _status(error)
        if status == 412:
            return self._newer()
        if status == 401:
            return HubError(
                f"the Hub does not accept the login for {self.repo_id} (401)",
                hint="log in with `hf auth login` and a token that has write access",
            )
        if status == 403:
            return HubError(
                f"you may not write to {self.repo_id} (403)",
                hint="ask its owner for write access, or log in with `hf auth login` and a token that has it",
            )
        if status == 404:
            return HubError(
                f"{self.repo_id}, or its revision {self.revision or 'main'}, is not on the Hub (404)",
                hint="look for a slip in the name; a pull request needs a repository that exists and that you may read",
            )
        if status == 409:
            return HubError(
                f"somebody else is changing {self.repo_id} (409); this push was not completed",
                hint="look at the repository, then push again: what is there already is not uploaded twice",
            )
        if status == 413:
            return HubError(
                f"the Hub takes no file or request of this size (413); {self.repo_id} is as it was",
                hint="save the weights in smaller shards: save_pretrained(..., max_shard_size='5GB')",
            )
        if status in _TRANSIENT:
            return HubError(
                f"the Hub answered {status} until the last of {len(self.waits) + 1} tries",
                hint="push again later: what was committed already is not committed twice",
            )
        if isinstance(error, ValueError) and status in (None, 400) and "README.md" in str(error):
            return CheckpointError(f"the Hub does not accept the card: {error}", hint="mend README.md")
        return HubError(f"the upload to {self.repo_id} failed: {_cause(error)}")


def _check_arguments(repo_id: str, revision: str | None, create_pr: bool, tag: str | None, message: str | None) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    problems = []
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        problems.append(Problem(("repo_id",), str(error)))
    else:
        if "/" not in repo_id:
            problems.append(Problem(("repo_id",), f"must be ORG/NAME, not {repo_id!r}"))
    if create_pr and revision is not None:
        problems.append(Problem(("revision",), "cannot be chosen together with create_pr"))
    if create_pr and tag is not None:
        problems.append(Problem(("tag",), "cannot be chosen together with create_pr"))
    if message is not None and (kind := find_secret(message.encode())):
        problems.append(Problem(("commit_message",), f"holds something that looks like {kind}"))
    if problems:
        raise ConfigError("push", tuple(problems))


def _same(content: Content, there: RepoFile | None) -> bool:
    if there is None:
        return False
    return there.lfs.sha256 == content.sha256 if there.lfs else there.blob_id == content.git


def _cause(error: BaseException) -> BaseException:
    # Uploads of large files come wrapped in a RuntimeError.
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error


def _status(error: BaseException) -> int | None:
    return getattr(getattr(_cause(error), "response", None), "status_code", None)


def _passes(error: BaseException, on: frozenset[int]) -> bool:
    import httpx2

    cause = _cause(error)
    # A lost connection is like 503: it is not known whether the call arrived.
    status = 503 if isinstance(cause, httpx2.TransportError) else _status(error)
    return status in on


def _asked_wait(error: BaseException, wait: float) -> float:
    response = getattr(_cause(error), "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(asked), _LONGEST_WAIT) if asked.isascii() and asked.isdigit() else wait
