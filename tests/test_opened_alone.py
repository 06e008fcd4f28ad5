"Every chapter opened alone, as a reader does it."

import papermill
import pytest
from conftest import ROOT

from tpro_nb import stages


@pytest.mark.parametrize("stage", stages.stage_names(ROOT))
def test_chapter_opened_alone_runs_all(stage, tmp_path):
    "What a reader does in a clean clone: open, run all cells, the stage section too, on toys."
    papermill.execute_notebook(
        str(stages.notebook_of(ROOT, stage)),
        str(tmp_path / "o.ipynb"),
        kernel_name="python3",
        cwd=str(ROOT / "nbs"),
        progress_bar=False,
    )
