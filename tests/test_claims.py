"""Claims: one resource for all spellings of a path, and which claims overlap."""

import os
from pathlib import Path

import pytest

from parallel_agents import ClaimMode, ResourceClaim
from parallel_agents import _claims as claims_module
from parallel_agents._claim_queue import find_overlap


def overlap(*claims: ResourceClaim) -> bool:
    return find_overlap((str(number), (claim,)) for number, claim in enumerate(claims)) is not None


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "src" / "deep").mkdir(parents=True)
    (tmp_path / "src" / "a.py").write_text("a")
    (tmp_path / "src2").mkdir()
    (tmp_path / "link").symlink_to("src")
    (tmp_path / "src" / "deep" / "file-link").symlink_to("../a.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_spellings_of_a_path_are_one_resource(tree: Path) -> None:
    spellings: list[str | Path] = [
        "src/a.py",
        "./src/a.py",
        "src//a.py",
        "src/./a.py",
        "src/deep/../a.py",
        "src2/../src/a.py",
        "link/a.py",
        "./link/deep/../a.py",
        "src/deep/file-link",
        str(tree / "src" / "a.py"),
        str(tree / "link" / "a.py"),
        Path("src") / "a.py",
    ]
    assert {ResourceClaim.path(s).resource for s in spellings} == {f"path:{tree.resolve()}/src/a.py"}
    missing = ["src/new/b.py", "link/new/b.py", "src/deep/../new/x/../b.py"]
    assert {ResourceClaim.path(s).resource for s in missing} == {f"path:{tree.resolve()}/src/new/b.py"}


def test_hard_links_are_one_resource_and_lie_in_their_folders(tree: Path) -> None:
    os.link("src/a.py", "src2/b.py")
    first, second = ResourceClaim.path("src/a.py"), ResourceClaim.path("src2/b.py")
    assert first == second
    assert overlap(first, second)
    for folder, inside, outside in (("src", first, second), ("src2", second, first)):
        assert overlap(ResourceClaim.path(folder), inside)
        assert overlap(inside, ResourceClaim.path(folder))
        assert not overlap(ResourceClaim.path(folder), outside)
    assert overlap(ResourceClaim.path("."), first)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("src", "src/a.py", True),
        ("src", "link/new/file", True),
        (".", "src2", True),
        ("/", "src", True),
        ("src", "src2", False),
        ("src/a.py", "src/b.py", False),
        ("src/a.py", "src/a.py", True),
    ],
)
def test_a_folder_overlaps_what_is_below_it_and_nothing_else(
    tree: Path, first: str, second: str, expected: bool
) -> None:
    one, two = ResourceClaim.path(first), ResourceClaim.path(second)
    assert overlap(one, two) is overlap(two, one) is expected


def test_shared_claims_go_together_and_with_nothing_exclusive(tree: Path) -> None:
    shared = ResourceClaim.path("src", mode=ClaimMode.SHARED)
    assert not overlap(shared, ResourceClaim.path("src/a.py", mode=ClaimMode.SHARED), shared)
    assert overlap(shared, ResourceClaim.path("src/a.py"))
    assert overlap(ResourceClaim.path("src/a.py"), shared)
    assert not overlap(ResourceClaim(resource="db", mode=ClaimMode.SHARED), ResourceClaim(resource="d"))


def test_an_owners_own_claims_may_overlap(tree: Path) -> None:
    own = (ResourceClaim.path("src"), ResourceClaim.path("src/a.py"))
    assert find_overlap([("a", own)]) is None
    found = find_overlap([("a", own), ("b", (ResourceClaim.path("src/deep"),))])
    assert found == (ResourceClaim.path("src/deep").resource, "a", "b")


def test_case_does_not_matter_where_the_file_system_ignores_it(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ResourceClaim.path("SRC/A.py") != ResourceClaim.path("src/a.py")
    monkeypatch.setattr(claims_module, "_ignores_case", lambda real: True)
    assert ResourceClaim.path("SRC/A.py") == ResourceClaim.path("src/a.py")


def test_a_folder_found_under_another_spelling_ignores_case(tree: Path) -> None:
    assert not claims_module._ignores_case(tree / "src" / "new")
    (tree / "SRC").symlink_to("src")  # stands for a file system on which both names are one folder
    assert claims_module._ignores_case(tree / "src" / "new")


@pytest.mark.parametrize("bad", ["", "  ", "a\0b"])
def test_what_cannot_be_a_path_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="path must be text"):
        ResourceClaim.path(bad)


def test_symbolic_links_in_a_circle_are_refused(tree: Path) -> None:
    (tree / "one").symlink_to("two")
    (tree / "two").symlink_to("one")
    with pytest.raises(ValueError, match="cannot be followed"):
        ResourceClaim.path("one/file")


def test_a_claim_needs_a_resource_and_a_mode() -> None:
    with pytest.raises(ValueError, match="resource must not be blank"):
        ResourceClaim(resource=" ")
    with pytest.raises(TypeError, match="mode"):
        ResourceClaim(resource="r", mode="shared")  # type: ignore[arg-type]
