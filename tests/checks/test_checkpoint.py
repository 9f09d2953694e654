"""Which names may be those of repositories on the Hub."""

import pytest

from vlm.checks.checkpoint import is_hub_name


@pytest.mark.parametrize("name", ["owner/name", "llava-hf/llava-1.5-7b-hf", "a_b/c.d"])
def test_a_repository_has_an_owner_and_a_name(name: str):
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "name", ["zip://a::b", "pipe:x/y", "a/../b", "../b", "/a/b", "a/b/c", "https://host/name", "a b/c", "a/b\n", ""]
)
def test_addresses_and_paths_are_no_names(name: str):
    assert not is_hub_name(name)
