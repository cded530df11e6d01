import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest

@pytest.fixture(scope="session")
def process_group():
    from hybrid_engine import EngineConfig, setup
    from data import DataConfig
    class C(EngineConfig, DataConfig): pass
    return setup(C())
