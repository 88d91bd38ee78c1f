"""The async client: the same operations, awaited, on both event loops."""

from pathlib import Path

import anyio
import pytest

import tenfold
from tenfold import errors
from tests.client.conftest import Service


async def journey(service: Service, done: str, folder: Path) -> None:
    async with tenfold.AsyncClient(service.url, service.key) as client:
        source = folder / "net.pt2"
        source.write_bytes(b"n" * 2_500_000)
        model = await client.upload_model(source)
        assert model.state == "inspecting"
        with pytest.raises(errors.WaitTimeout):
            await model.wait(0)
        await anyio.to_thread.run_sync(service.workers.inspect)
        await model.wait(5)
        await model.delete()
        job = await (await client.job(done)).wait(1)
        assert done in [j.id async for j in client.jobs()]
        assert await job.front
        assert len(await job.trials()) == 15
        files = await job.download(folder / "out")
        assert {f.name for f in files} == {"model.pt2", "model.onnx", "report.json"}
        with pytest.raises(errors.Conflict):
            await job.resume()
        with pytest.raises(errors.NotFound):
            await client.job("job_none")


@pytest.mark.parametrize("loop", ["asyncio"])
def test_from_upload_to_files(service: Service, done: str, tmp_path: Path, loop: str) -> None:
    anyio.run(journey, service, done, tmp_path, backend=loop)


def test_waiting_for_one_job_does_not_hold_up_another_task(service: Service, done: str) -> None:
    job_id = service.workers.job("waited for")
    order: list[str] = []

    async def main() -> None:
        async with tenfold.AsyncClient(service.url, service.key) as client, anyio.create_task_group() as group:

            async def wait() -> None:
                with pytest.raises(errors.JobFailed):
                    await (await client.job(job_id)).wait(10)
                order.append("ended")

            group.start_soon(wait)
            await anyio.sleep(0.3)
            await client.job(done)
            order.append("other")
            await (await client.job(job_id)).cancel()

    anyio.run(main)
    assert order == ["other", "ended"]


def test_both_clients_have_the_same_operations() -> None:
    for sync, awaited in ((tenfold.Client, tenfold.AsyncClient), (tenfold.Job, tenfold.AsyncJob)):
        assert {n for n in dir(sync) if not n.startswith("_")} == {n for n in dir(awaited) if not n.startswith("_")}
