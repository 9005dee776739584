"""A service: a model that stays loaded, and two requests at once."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from fastapi import Body, FastAPI
from fastapi.testclient import TestClient

import medseg


def make_app(model: medseg.Segmenter) -> FastAPI:
    app = FastAPI()

    @app.post("/volumes")
    def volumes(
        scan: Annotated[bytes, Body(media_type="application/octet-stream")],
    ) -> list[dict[str, Any]]:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "scan.nii.gz"
            path.write_bytes(scan)
            return model(path).structures

    return app


def main(folder: Path) -> None:
    client = TestClient(make_app(medseg.load(folder / "model")))
    headers = {"content-type": "application/octet-stream"}
    names = ("scan.nii.gz", "flair.nii.gz")

    def ask(name: str) -> Any:
        return client.post("/volumes", content=(folder / name).read_bytes(), headers=headers).json()

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(ask, names))
    for name, answer in zip(names, answers):
        alone = medseg.segment(folder / name, folder / "model").structures
        assert answer == alone and alone[0]["ml"] > 0
    assert answers[0] != answers[1]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
