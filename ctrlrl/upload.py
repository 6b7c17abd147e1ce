"""What `ctrlrl submit` sends to a cluster: the working tree's code and recipes, never secrets, and nothing from outside the tree.

`.gitignore` files are honoured as git does, and `.ctrlrlignore` files (the same syntax) after them, so that `!my.toml` takes back what
git leaves out. Symbolic links are followed within the tree alone.
"""

import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pathspec import GitIgnoreSpec

from ctrlrl.errors import RunError

UPLOAD_LIMIT = 100 * 2**20  # bytes of the zipped working directory, of Ray's job server
IGNORE_FILES = (".gitignore", ".ctrlrlignore")
# Left out wherever they are, and left out at the top alone (ctrlrl/data is code).
_NEVER = {".git", ".venv", "venv", "node_modules", "__pycache__", ".cache", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis"}
_NOT_AT_TOP = {"runs", "data", "build", "dist", "wandb", "checkpoints"}
# Where people keep passwords, keys and tokens; compared in lower case. No ignore file can take them back.
_SECRETS = GitIgnoreSpec.from_lines(
    """
    .env .env.* *.env .envrc .netrc _netrc .npmrc .yarnrc.yml .pypirc .git-credentials .gitconfig .htpasswd .pgpass .my.cnf .boto .s3cfg
    .ssh/ .aws/ .azure/ .gnupg/ .kube/ .docker/ .oci/ .config/gcloud/ .huggingface/ .vault-token .terraform/ *.tfstate *.tfstate.*
    *.tfvars id_rsa* id_dsa* id_ecdsa* id_ed25519* *.pem *.key *.p12 *.pfx *.p8 *.jks *.keystore *.kdbx *.ppk *.gpg *.ovpn
    credentials credentials.json credentials.y*ml credentials.toml credentials.ini credentials.csv *-credentials.json
    *_credentials.json service-account*.json service_account*.json client_secret*.json
    application_default_credentials.json kubeconfig kubeconfig.* auth_token .token *.token hf_token token.txt
    secrets.json secrets.y*ml secrets.toml secrets.ini secrets.txt secret.json secret.y*ml secret.toml .secrets .secrets.* secrets/
    .secrets/ .*_history
    """.split()
)
_PRIVATE_KEY = re.compile(
    rb"^-----BEGIN [A-Z0-9 ]*PRIVATE KEY( BLOCK)?-----|^PuTTY-User-Key-File-|^AGE-SECRET-KEY-1|\"private_key\": *\"-----BEGIN", re.M
)
_LISTED = "an ignore file lists it"
_HEAD = 8192  # bytes of a file that are searched for a private key
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Tree:
    """What goes: (name in the archive, file) in the order of names. left_out: what does not go and is no mere cache, with the reason."""

    root: Path
    files: list[tuple[str, Path]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def surprises(self) -> dict[str, str]:
        """What is left out though no ignore file lists it."""
        return {name: reason for name, reason in sorted(self.left_out.items()) if reason != _LISTED}

    @property
    def bytes(self) -> int:
        """Size before packing."""
        return sum(path.stat().st_size for _, path in self.files)

    def largest(self, count: int = 3) -> list[tuple[str, int]]:
        """The largest files: (name, bytes)."""
        return sorted(((name, path.stat().st_size) for name, path in self.files), key=lambda f: (-f[1], f[0]))[:count]

    def check_arguments(self, arguments: Sequence[str]) -> None:
        """Raise RunError if an argument names a file of the tree that does not go: the job would miss it."""
        going = {name for name, _ in self.files}
        for argument in arguments:
            name = os.path.normpath(argument.partition("=")[2] if argument.startswith("--") and "=" in argument else argument)
            if not os.path.isabs(name) and (self.root / name).is_file() and name not in going:
                reason = self.left_out.get(name, "it lies outside of the working directory, or in a folder that is not uploaded")
                raise RunError(f"{name!r} is not uploaded ({reason}), so the job would not find it: rename or move it, or give a path "
                               "that the nodes see")  # fmt: skip


def scan(root: Path) -> Tree:
    """Decide what of the working tree goes. RunError for a file whose name an archive cannot hold, and for an empty tree."""
    tree = Tree(root.resolve())
    for name, path in _walk(tree, tree.root, "", [], ()):
        try:
            name.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(name).decode("latin-1")
            raise RunError(
                f"the file name {shown!r} is not UTF-8, and archives name files in UTF-8: rename it, or list it in .ctrlrlignore"
            ) from None
        tree.files.append((name, path))
    tree.files.sort()
    if not tree.files:
        raise RunError(f"{str(root)!r} has nothing to upload: run this in the directory of your recipe")
    return tree


def pack(tree: Tree, archive: Path) -> int:
    """Zip the tree; returns the archive's bytes. RunError if Ray would not take it. The same tree gives the same archive."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, path in tree.files:
            info = zipfile.ZipInfo(name)
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, (path.stat().st_mode & 0xFFFF) << 16
            try:
                with path.open("rb") as source, packed.open(info, "w", force_zip64=True) as target:
                    while chunk := source.read(_CHUNK):  # in parts: a model that lies here by mistake is refused, not read whole
                        target.write(chunk)
                        if packed.fp.tell() > UPLOAD_LIMIT:
                            raise RunError(_too_large(tree))
            except PermissionError:
                raise RunError(f"{name!r} cannot be read: change its permissions, or list it in .ctrlrlignore") from None
    size = archive.stat().st_size
    if size > UPLOAD_LIMIT:
        raise RunError(_too_large(tree))
    return size


def _walk(
    tree: Tree, folder: Path, prefix: str, specs: list[tuple[str, GitIgnoreSpec]], above: tuple[Path, ...]
) -> Iterator[tuple[str, Path]]:
    """Files below `folder`, which is called `prefix` in the archive. specs: ignore files from the top down; above: real folders passed."""
    specs = [*specs, *_ignore_files(folder, prefix)]
    for path in sorted(folder.iterdir(), key=lambda p: os.fsencode(p.name)):
        name = prefix + path.name
        if _is_data_or_cache(Path(name)):
            continue
        real = path.resolve()
        if path.is_symlink() and not real.is_relative_to(tree.root):
            tree.left_out[name] = "a link to outside of the working directory"
        elif path.is_symlink() and _is_data_or_cache(real.relative_to(tree.root)):
            tree.left_out[name] = "a link to data, runs or caches"
        elif path.is_symlink() and not real.exists():
            tree.left_out[name] = "a link to nothing"
        elif _is_secret(name, real.relative_to(tree.root).as_posix(), path.is_dir()):
            tree.left_out[name] = "it looks like a secret"
        elif _ignored(name, path.is_dir(), specs):
            tree.left_out[name + "/" * path.is_dir()] = _LISTED
        elif path.is_dir():
            if real in above or real == folder.resolve():
                tree.left_out[name] = "a link to a folder around it"
            else:
                yield from _walk(tree, path, f"{name}/", specs, (*above, folder.resolve()))
        elif path.is_file():
            if _holds_private_key(path):
                tree.left_out[name] = "it holds a private key"
            else:
                yield name, path


def _is_data_or_cache(path: Path) -> bool:
    """Of a path below the tree's root."""
    first = path.parts[0] if path.parts else ""
    return first in _NOT_AT_TOP or any(part in _NEVER or part.endswith(".egg-info") for part in path.parts)


def _ignore_files(folder: Path, prefix: str) -> Iterator[tuple[str, GitIgnoreSpec]]:
    for ignore in IGNORE_FILES:
        if (folder / ignore).is_file():
            yield prefix, GitIgnoreSpec.from_lines((folder / ignore).read_text(errors="surrogateescape").splitlines())


def _ignored(name: str, is_dir: bool, specs: list[tuple[str, GitIgnoreSpec]]) -> bool:
    """The last ignore file that says something of `name` decides."""
    for prefix, spec in reversed(specs):
        said = spec.check_file(name.removeprefix(prefix) + "/" * is_dir).include
        if said is not None:
            return said
    return False


def _is_secret(name: str, real: str, is_dir: bool) -> bool:
    return any(_SECRETS.match_file(known.lower() + "/" * is_dir) for known in (name, real))


def _holds_private_key(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _PRIVATE_KEY.search(file.read(_HEAD)) is not None
    except PermissionError:
        return False  # packing it will say so


def _too_large(tree: Tree) -> str:
    named = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in tree.largest())
    return (
        f"{str(tree.root)!r} packs to more than the {UPLOAD_LIMIT // 2**20} MiB that Ray takes; the largest files are {named}: "
        "move them to a path that the nodes see, or to data/ or runs/, which are not uploaded, or list them in .ctrlrlignore"
    )
