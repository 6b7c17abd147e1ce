"""What is uploaded to a cluster: code and recipes; no secrets, nothing from outside, nothing that an ignore file lists."""

import os
import zipfile
from pathlib import Path

import pytest

import ctrlrl.upload as uploading
from ctrlrl.errors import RunError
from ctrlrl.upload import pack, scan


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def going(folder: Path) -> list[str]:
    return [name for name, _ in scan(folder).files]


def test_the_code_goes_and_caches_and_data_do_not(tmp_path):
    left_out = (".git/config", ".venv/bin/python", "runs/a/metrics.jsonl", "data/prompts.jsonl", "a/__pycache__/x.pyc", "a.egg-info/PKG")
    folder = make(tmp_path / "tree", "ctrlrl/data/shards.py", "my.toml", "jobs/runs/x.py", *left_out)
    size = pack(scan(folder), tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as packed:
        assert packed.namelist() == ["ctrlrl/data/shards.py", "jobs/runs/x.py", "my.toml"]
        assert packed.read("my.toml") == b"my.toml"
    assert size == (tmp_path / "a.zip").stat().st_size
    os.utime(folder / "my.toml", (1, 1))
    pack(scan(folder), tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()  # Ray uploads it once


SECRETS = (
    ".env", ".env.local", "prod.env", "a/.ENV", ".aws/credentials", ".ssh/config", "id_ed25519", "deploy/id_rsa.old", "server.pem",
    "tls.KEY", ".netrc", ".kube/config", "kubeconfig", ".config/gcloud/x.json", "service-account-prod.json", "terraform.tfstate",
    "secrets.yaml", "secrets/db.txt", ".pypirc", ".git-credentials", "x.kdbx", "hf_token", ".bash_history",
)  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_never_go_not_even_when_asked_for(tmp_path, name):
    folder = make(tmp_path / "tree", "my.toml", "ctrlrl/tokens.py", "secretary.py", "environment.toml", name)
    (folder / ".ctrlrlignore").write_text(f"!{name}\n!**\n")
    assert going(folder) == [".ctrlrlignore", "ctrlrl/tokens.py", "environment.toml", "my.toml", "secretary.py"]
    left_out = scan(folder).surprises()
    assert len(left_out) == 1 and next(iter(left_out.values())) == "it looks like a secret"


def test_a_private_key_is_known_by_its_text(tmp_path):
    folder = make(tmp_path / "tree", "my.toml")
    (folder / "notes").write_text("see below\n-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl\n")
    (folder / "account.json").write_text('{"type": "service_account", "private_key": "-----BEGIN PRIVATE KEY-----\\nMII"}')
    (folder / "about.md").write_text("A key begins with `-----BEGIN PRIVATE KEY-----`.\n")
    assert going(folder) == ["about.md", "my.toml"]
    assert scan(folder).left_out == {"account.json": "it holds a private key", "notes": "it holds a private key"}


def test_links_are_followed_within_the_tree_alone(tmp_path):
    outside = make(tmp_path / "outside", "credentials", "notes.txt")
    folder = make(tmp_path / "tree", "shared/ppo.toml", "runs/a.json", "a.py", ".env")
    for link, target in {
        "recipes": folder / "shared", "home": outside, "notes": outside / "notes.txt", "old_runs": folder / "runs", "b.py": folder / "a.py",
        "shared/up": folder, "gone": folder / "nothing", "settings": folder / ".env",
    }.items():  # fmt: skip
        (folder / link).symlink_to(target)
    tree = scan(folder)
    assert [name for name, _ in tree.files] == ["a.py", "b.py", "recipes/ppo.toml", "shared/ppo.toml"]
    assert tree.left_out == {
        ".env": "it looks like a secret", "settings": "it looks like a secret", "gone": "a link to nothing",
        "home": "a link to outside of the working directory", "notes": "a link to outside of the working directory",
        "old_runs": "a link to data, runs or caches", "shared/up": "a link to a folder around it",
        "recipes/up": "a link to a folder around it",
    }  # fmt: skip
    pack(tree, tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as packed:
        assert packed.read("recipes/ppo.toml") == b"shared/ppo.toml"


def test_ignore_files_are_read_as_git_reads_them(tmp_path):
    folder = make(
        tmp_path / "tree", "a.log", "keep.log", "models/w.bin", "sub/a.log", "sub/deep/b.tmp", "sub/c.tmp", "my.local.toml", "x.py"
    )
    (folder / ".gitignore").write_text("*.log\n!keep.log\n/models\n*.local.toml\n")
    (folder / "sub/.gitignore").write_text("/*.tmp\n!a.log\n")
    (folder / ".ctrlrlignore").write_text("!my.local.toml\nx.py\n")
    assert going(folder) == [
        ".ctrlrlignore", ".gitignore", "keep.log", "my.local.toml", "sub/.gitignore", "sub/a.log", "sub/deep/b.tmp"
    ]  # fmt: skip
    assert scan(folder).surprises() == {} and scan(folder).left_out["models/"] == "an ignore file lists it"


def test_a_recipe_that_does_not_go_is_told_before_the_job_starts(tmp_path):
    folder = make(tmp_path / "tree", "a.toml", "b.toml", "runs/c.toml")
    (folder / ".gitignore").write_text("b.toml\n")
    tree = scan(folder)
    tree.check_arguments(["--recipe", "a.toml", "--recipe=./a.toml", "--set", "prompts=/shared/b.toml", "--out", "nowhere"])
    for arguments in (["--recipe", "b.toml"], ["--recipe=b.toml"], ["./b.toml"]):
        with pytest.raises(RunError, match=r"'b.toml' is not uploaded \(an ignore file lists it\)"):
            tree.check_arguments(arguments)
    with pytest.raises(RunError, match="'runs/c.toml' is not uploaded"):
        tree.check_arguments(["runs/c.toml"])


def test_a_tree_that_ray_would_refuse_is_refused_here_without_being_read_whole(tmp_path, monkeypatch):
    folder = make(tmp_path / "tree", "a.py")
    (folder / "weights.bin").write_bytes(os.urandom(3 << 20))
    os.truncate(folder / "weights.bin", 1 << 40)  # a terabyte, nearly all of it a hole
    monkeypatch.setattr(uploading, "UPLOAD_LIMIT", 2 << 20)
    told = r"more than the 2 MiB that Ray takes; the largest files are weights.bin \(1048576 MiB\), a.py .*move them"
    with pytest.raises(RunError, match=told):
        pack(scan(folder), tmp_path / "a.zip")
    assert (tmp_path / "a.zip").stat().st_size < 4 << 20
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="nothing to upload"):
        scan(tmp_path / "empty")


def test_a_name_that_is_not_utf8_is_refused_by_name_unless_it_is_ignored(tmp_path):
    folder = make(tmp_path / "tree", "a.py")
    (folder / os.fsdecode(b"caf\xe9.toml")).write_text("x")
    with pytest.raises(RunError, match=r"the file name 'café.toml' is not UTF-8.*rename it"):
        scan(folder)
    (folder / ".ctrlrlignore").write_text("caf*\n")
    assert going(folder) == [".ctrlrlignore", "a.py"]
