"""A file, and the model that suits it."""

import sys
from pathlib import Path

import medseg


def main(folder: Path) -> None:
    result = medseg.segment(folder / "ct.nii.gz")
    assert result.plan.model == "ct-tissues"

    table = result.volumes
    assert next(iter(table["name"])) == result.table.labels[0].name
    assert "mean_hu" in list(table.columns)

    written = result.save(folder / "from_path" / "tissues.seg.nrrd")
    assert (medseg.read_labels(written).data == result.labels.data).all()
    record = written.with_name("tissues.json")
    assert '"ct-tissues"' in record.read_text(encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
