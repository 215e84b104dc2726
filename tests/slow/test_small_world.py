import pytest
import torch

from tasks.small_world.make_models import THREADS, make_models


@pytest.mark.slow
def test_both_models_can_be_made_again(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        measured = make_models(tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert 0.36 < measured["student"]["none"] < 0.47
    assert measured["teacher"]["positive"] > 0.94
    assert 0.78 < measured["teacher"]["none"] < 0.89
    assert measured["teacher"]["positive"] - measured["teacher"]["negative"] > 0.15
    assert {path.name for path in tmp_path.iterdir()} == {"student", "teacher"}
