"""A front that loses connections and is busy now and then: the client goes on, and nothing happens twice."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

import tenfold
from tenfold import errors
from tenfold._wire import Request, Sleep, patient, send
from tests.client.conftest import Service


class Front:
    """Passes bytes between clients and the service. ``faults``: what befalls the next connections, in order.

    ``close``: closed at once · ``busy``: answered 503 · ``cut``: the reply ends after some bytes ·
    ``deaf``: the request reaches the service and its answer is lost.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.faults: list[str] = []
        self.connections = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            fault = self.faults.pop(0) if self.faults else ""
            threading.Thread(target=self._serve, args=(peer, fault), daemon=True).start()

    def _serve(self, peer: socket.socket, fault: str) -> None:
        with peer, suppress(OSError):
            if fault == "close":
                peer.recv(100)
            elif fault == "busy":
                peer.recv(65_536)
                peer.sendall(b"HTTP/1.1 503 Busy\r\nRetry-After: 0\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            else:
                self._pass(peer, fault)
            peer.shutdown(socket.SHUT_RDWR)  # closing alone says nothing while another thread reads

    def _pass(self, peer: socket.socket, fault: str) -> None:
        address = self.service.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as inner:
            threading.Thread(target=_copy, args=(peer, inner), daemon=True).start()
            sent = 0
            while data := inner.recv(65_536):
                if fault == "deaf":
                    return
                if fault == "cut" and sent + len(data) > 1_000_000:
                    return
                peer.sendall(data)
                sent += len(data)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def front(service: Service) -> Iterator[Front]:
    made = Front(service)
    yield made
    made.listener.shutdown(socket.SHUT_RDWR)
    made.listener.close()


@pytest.fixture
def shaky(front: Front, service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[tenfold.Client]:
    monkeypatch.setattr("tenfold._wire._pause", lambda attempt: 0.01)
    with tenfold.Client(front.url, service.key) as made:
        yield made


def test_lost_connections_and_a_busy_service_are_tried_again(shaky: tenfold.Client, front: Front, done: str) -> None:
    front.faults = ["close", "busy", "close"]
    assert shaky.job(done).state == "done"
    assert front.connections == 4


def test_it_gives_up_after_its_retries(front: Front, service: Service, done: str, shaky: tenfold.Client) -> None:
    front.faults = ["close"] * 9
    with tenfold.Client(front.url, service.key, retries=2) as client, pytest.raises(errors.ConnectionFailed):
        client.job(done)
    assert front.connections == 3
    front.faults = ["busy"] * 9
    with tenfold.Client(front.url, service.key, retries=1) as client, pytest.raises(errors.ServerError) as e:
        client.job(done)
    assert e.value.status == 503


def test_a_post_whose_answer_was_lost_acts_once(shaky: tenfold.Client, front: Front) -> None:
    before = len(shaky.keys())
    shaky.close()
    with tenfold.Client(front.url, shaky._driver.connection.headers["Authorization"].split()[1]) as client:
        front.faults = ["deaf"]
        client.create_key("once", scopes=["read"])
        assert len(client.keys()) == before + 1


def test_a_delete_whose_answer_was_lost_is_done(shaky: tenfold.Client, front: Front, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    id = shaky.upload(tmp_path / "a")
    shaky._driver._http.close()
    shaky._driver._http = httpx.Client(base_url=front.url, headers=shaky._driver.connection.headers)
    front.faults = ["deaf"]
    shaky.delete_upload(id)
    assert id not in {u["id"] for u in shaky.uploads()}


@pytest.mark.parametrize("fault", ["close", "deaf"])
def test_an_upload_is_sent_again_from_its_start(shaky, front: Front, tmp_path: Path, fault: str) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(os.urandom(2_500_000))
    front.faults = [fault]
    with front.service.client() as direct:
        before = {u["id"] for u in direct.uploads()}
    id = shaky.upload(path)
    stored = {u["id"]: u for u in shaky.uploads() if u["id"] not in before}
    assert list(stored) == [id]
    assert stored[id]["size"] == 2_500_000


def test_a_download_that_breaks_off_goes_on_by_itself(shaky, front: Front, done: str, tmp_path: Path) -> None:
    artifact = next(a for a in shaky.job(done).artifacts() if a["format"] == "pt2")
    with tenfold.Client(front.url, front.service.key) as client:
        front.faults = ["cut", "cut", "busy"]
        used = front.connections
        path = client.artifact(artifact.id).download(tmp_path)
    assert path.stat().st_size == artifact["size"]
    assert front.connections - used >= 3


# ---------------------------------------------------------------------------------------- without any network at all


def play(answers: list[Callable[[], httpx.Response]], retries: int = 5, method: str = "GET") -> tuple[int, list[float]]:
    """Drives one exchange through ``answers``; returns the last status and the pauses between the tries."""
    steps = patient(send(method, "/x"), retries)
    pauses: list[float] = []
    effect = next(steps)
    try:
        while True:
            if isinstance(effect, Sleep):
                pauses.append(effect.seconds)
                effect = steps.send(None)
                continue
            assert isinstance(effect, Request)
            try:
                answer = answers.pop(0)()
            except errors.ConnectionFailed as e:
                effect = steps.throw(e)
            else:
                effect = steps.send(answer)
    except StopIteration as end:
        return end.value.status_code, pauses


def lost() -> httpx.Response:
    raise errors.ConnectionFailed("lost")


def test_pauses_grow_and_differ_from_client_to_client() -> None:
    runs = [play([lost] * 5 + [lambda: httpx.Response(200)])[1] for _ in range(5)]
    for pauses in runs:
        for attempt, pause in enumerate(pauses):
            assert 0.1 * 2**attempt <= pause <= 0.2 * 2**attempt
    assert len({tuple(pauses) for pauses in runs}) == 5


def test_retry_after_is_kept_to_and_a_long_one_is_told() -> None:
    assert play([lambda: httpx.Response(429, headers={"Retry-After": "3"}), lambda: httpx.Response(200)]) == (200, [3])
    with pytest.raises(errors.RateLimited):
        play([lambda: httpx.Response(429, headers={"Retry-After": "3600"})])


def test_a_refusal_is_not_tried_again() -> None:
    for status in (400, 401, 403, 404, 409, 422, 500):
        with pytest.raises(errors.APIError) as e:
            play([lambda status=status: httpx.Response(status, text="<p>a proxy's page</p>")])
        assert e.value.status == status
        assert "a proxy's page" in e.value.detail


def test_a_first_request_that_still_runs_is_waited_for() -> None:
    busy = httpx.Response(409, json={"code": "idempotency_key_in_progress"})
    assert play([lambda: busy, lambda: httpx.Response(201)], method="POST")[0] == 201
