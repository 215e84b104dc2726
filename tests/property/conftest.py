import pytest
import torch
from hypothesis import settings

# No deadline: the first call of a torch operator is slow. No database: no run depends on an earlier one.
# Derandomised: the same examples in every run; raise max_examples to search further.
settings.register_profile("vzero", deadline=None, database=None, derandomize=True, max_examples=30)
settings.load_profile("vzero")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
