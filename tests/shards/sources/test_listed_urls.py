"""URLs in lists whose servers refuse, fail or are gone: each is set aside, and the others are converted."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.conversion.convert import convert
from shards.errors import UserError
from shards.format import layout
from shards.sources import file_list
from shards.sources.file_list import ListSource
from shards.sources.source_options import ListOptions
from shards.storage import remote
from tests.s3 import FaultProxy, web_server
from tests.shards.sources.test_tar import jpeg, mask


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(file_list, "_web", file_list._Web())
    (tmp_path / "www").mkdir()
    for i in range(30):
        (tmp_path / "www" / f"{i}.jpg").write_bytes(jpeg(i))
    (tmp_path / "www" / "m.png").write_bytes(mask(1))
    with web_server(tmp_path / "www") as proxy:
        proxy.faults = lambda method, path, count: (
            path[1:4] if path[1:4].isdigit() and path[4] == "/" else None
        )
        yield proxy


def nobody() -> str:
    """The address of a port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def converted(folder: Path, lines: list[str], root: str = "") -> tuple[int, dict[str, str]]:
    """How many images were converted, and the reasons of the others by their names."""
    (folder / "list.csv").write_text("\n".join(["url,mask", *lines]))
    source = ListSource(str(folder / "list.csv"), ListOptions(root=root))
    manifest = convert(source, folder / "out", workers=0)
    assert manifest is not None
    quarantine = (folder / "out" / layout.QUARANTINE).read_text().splitlines()
    bad = [json.loads(line) for line in quarantine]
    return manifest.num_samples, {one["source"]: one["reason"] for one in bad}


def test_a_url_that_is_refused_or_fails_is_quarantined_and_the_rest_converted(
    web: FaultProxy, tmp_path: Path
):
    gone = nobody()
    bad = {
        f"{web.url}/403/a.jpg": "cannot be read: the server answers 403 (Forbidden)",
        f"{web.url}/401/a.jpg": "cannot be read: the server answers 401 (Unauthorized)",
        f"{web.url}/404/a.jpg": "cannot be read: there is no such file",
        f"{web.url}/503/a.jpg": "cannot be read: the server does not answer",
        f"{gone}/a.jpg": "cannot be read: the server does not answer",
    }
    lines = [f"{url}," for url in bad]
    lines += [f"{web.url}/{i}.jpg,{web.url}/m.png" for i in range(2)]
    lines += [f"{web.url}/{i}.jpg," for i in range(2, 5)]
    lines += [f"{web.url}/7.jpg,{web.url}/403/m.png"]
    num, reasons = converted(tmp_path, lines)
    assert num == 5
    masked = f"its mask '{web.url}/403/m.png' cannot be read: the server answers 403 (Forbidden)"
    assert reasons == bad | {f"{web.url}/7.jpg": masked}
    assert layout.Manifest.load(tmp_path / "out").num_masks == 2


def test_a_server_that_is_gone_is_not_waited_for_again(web: FaultProxy, tmp_path: Path):
    lines = [f"{web.url}/503/{i}.jpg," for i in range(6)]
    converted(tmp_path, [*lines, *(f"{web.url}/{i}.jpg," for i in range(3))])
    tries = web.requests("GET", "/503/")
    assert tries <= 6 * remote.TRIES
    assert tries >= remote.TRIES


def test_many_in_a_row_stop_only_where_no_other_answers(
    web: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(file_list, "MANY_IN_A_ROW", 3)
    gone = nobody()
    lines = [f"{gone}/{i}.jpg," for i in range(20)]
    with pytest.raises(UserError, match="Run the same command again"):
        converted(tmp_path, lines)
    num, reasons = converted(tmp_path / "www", [*lines, *(f"{web.url}/{i}.jpg," for i in range(30))])
    assert (num, len(reasons)) == (30, 20)


def test_a_file_that_a_root_on_the_web_refuses_is_quarantined(web: FaultProxy, tmp_path: Path):
    num, reasons = converted(tmp_path, ["0.jpg,", "403/1.jpg,", "2.jpg,"], root=web.url)
    assert num == 2
    assert reasons == {"403/1.jpg": "cannot be read: the server answers 403 (Forbidden)"}
