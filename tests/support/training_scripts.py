"""Forty programs as people write them, and what ``--preload auto`` is to make of each. Small enough to be run."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Script(NamedTuple):
    """A program, and the decision about it."""

    text: str
    imports: str
    """The slow modules that are imported ahead of it, in this order; empty: its workers start cold."""
    reason: str = ""
    """What the reason for nothing more contains; empty: there is none."""
    files: Mapping[str, str] = MappingProxyType({})
    """Its own modules: their texts by path."""
    program: str = "train.py"
    """The path of its file."""
    module: str = ""
    """Its name, if it is run with ``-m``."""
    needs: str = ""
    """A package that it needs, which the test environment lacks."""


STEP = """
def main():
    torch.manual_seed(1)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).sum()
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.4f}")
"""
MAIN = STEP + '\n\nif __name__ == "__main__":\n    main()\n'
COLD = "imports nothing"

SCRIPTS: dict[str, Script] = {
    # ---- as in torch's tutorials
    "ddp": Script(
        '"""Train with DDP."""\n'
        "import argparse\nimport os\nimport torch\nimport torch.distributed as dist\nimport torch.nn as nn\n"
        "from torch.nn.parallel import DistributedDataParallel as DDP\n"
        "from torch.utils.data import DataLoader, Dataset\n"
        "from torch.utils.data.distributed import DistributedSampler\n\n\n"
        "class Ones(Dataset):\n    def __len__(self):\n        return 8\n    def __getitem__(self, index):\n"
        "        return torch.ones(4)\n\n\n"
        "def main(args):\n    dist.init_process_group('gloo')\n    torch.manual_seed(0)\n"
        "    model = DDP(nn.Linear(4, 1))\n    data = Ones()\n"
        "    for batch in DataLoader(data, 2, sampler=DistributedSampler(data)):\n        loss = model(batch).sum()\n"
        "        loss.backward()\n    print(f'{loss.item():.4f}')\n    dist.destroy_process_group()\n\n\n"
        "if __name__ == '__main__':\n    parser = argparse.ArgumentParser()\n    main(parser.parse_args())\n",
        "torch torch.distributed torch.nn torch.nn.parallel torch.utils.data torch.utils.data.distributed",
    ),
    "future annotations and typing": Script(
        "from __future__ import annotations\nimport os\nfrom typing import TYPE_CHECKING, Any\n"
        "if TYPE_CHECKING:\n    import nowhere\nimport torch\ndef f(x: nowhere.Thing) -> Any: return x\n" + MAIN,
        "torch",
    ),
    "numpy first": Script(
        "import random\nimport numpy as np\nimport torch\n"
        "random.seed(0); np.random.seed(0)\nprint(random.random(), np.random.rand())\n" + MAIN,
        "numpy torch",
    ),
    "threads by variable": Script(
        "import os\nos.environ['OMP_NUM_THREADS'] = '1'\nimport torch\n" + MAIN, "", "train.py:2: os.environ"
    ),
    "default of a variable": Script(
        "import os\nos.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')\nimport torch\n" + MAIN,
        "",
        "train.py:2: os.environ",
    ),
    "devices by variable": Script(
        "import os, sys\nos.environ.update(CUDA_VISIBLE_DEVICES=os.environ['LOCAL_RANK'])\nimport torch\n" + MAIN,
        "",
        "train.py:2: os.environ.update",
    ),
    "putenv after torch": Script(
        "import os\nimport torch\nos.environ['TOKENIZERS_PARALLELISM'] = 'false'\nimport numpy as np\n" + MAIN,
        "torch",
        "train.py:3: os.environ",
    ),
    "reads its rank": Script(
        "import os\nRANK = int(os.environ.get('RANK', 0))\nWORLD = int(os.environ['WORLD_SIZE'])\n"
        "IS_FIRST: bool = RANK == 0\nimport torch\nprint(RANK, WORLD, IS_FIRST)\n" + MAIN,
        "torch",
    ),
    "sys.path": Script(
        "import os, sys\nsys.path.append(os.path.dirname(os.path.abspath(__file__)))\nimport torch\n" + MAIN,
        "",
        "train.py:2: sys.path.append",
    ),
    "sys.path by item": Script(
        "import sys\nsys.path[0:0] = ['/nowhere']\nimport torch\n" + MAIN, "", "train.py:2: sys.path"
    ),
    "start method": Script(
        "import multiprocessing as mp\nmp.set_start_method('spawn', force=True)\nimport torch\n" + MAIN,
        "",
        "train.py:2: mp.set_start_method",
    ),
    "start method in main": Script(
        "import torch\nimport torch.multiprocessing as mp\n" + STEP + "\nif __name__ == '__main__':\n"
        "    mp.set_start_method('spawn', force=True)\n    main()\n",
        "torch torch.multiprocessing",
    ),
    "warnings": Script(
        "import warnings\nwarnings.filterwarnings('ignore')\nimport torch\n" + MAIN, "", "train.py:2: warnings"
    ),
    "logger before": Script(
        "import logging\nfrom pathlib import Path\nlogger = logging.getLogger(__name__)\n"
        "ROOT = Path(__file__).resolve().parent\nNAME = 'a b'.split()\nimport torch\nprint(NAME)\n" + MAIN,
        "torch",
    ),
    "logging set up before": Script(
        "import logging\nlogging.basicConfig(level=logging.INFO)\nimport torch\n" + MAIN, "", "train.py:2: logging"
    ),
    "in main only": Script(
        "def main():\n    import torch\n    print(torch.ones(1).item())\n\n\nif __name__ == '__main__':\n    main()\n",
        "",
        COLD,
    ),
    "at the top of main": Script(
        "import os\nif __name__ == '__main__':\n    import torch\n    print(torch.ones(1).item())\n", "torch"
    ),
    "fsdp": Script(
        "import os\nimport torch\nfrom torch.distributed.device_mesh import init_device_mesh\n"
        "from torch.distributed.fsdp import FullyShardedDataParallel as FSDP\n"
        "from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy\n" + MAIN,
        "torch torch.distributed.device_mesh torch.distributed.fsdp torch.distributed.fsdp.wrap",
    ),
    "optional torch": Script(
        "try:\n    import nowhere\nexcept ImportError:\n    nowhere = None\n"
        "try:\n    import torch\nexcept ImportError as error:\n    raise SystemExit('no torch')\n" + MAIN,
        "torch",
    ),
    "record": Script(
        "import torch\nfrom torch.distributed.elastic.multiprocessing.errors import record\n"
        + STEP.replace("def main", "@record\ndef main")
        + "\nif __name__ == '__main__':\n    main()\n",
        "torch torch.distributed.elastic.multiprocessing.errors",
    ),
    "compiled": Script(
        "import torch\nfrom torch import nn\nimport torch._dynamo\nimport torch.nn.functional as F\n" + MAIN,
        "torch torch torch._dynamo torch.nn.functional",
    ),
    "vision": Script(
        "import torch\nimport torchvision\nfrom torchvision import datasets, transforms\n" + MAIN,
        "torch torchvision torchvision",
        needs="torchvision",
    ),
    # ---- with modules of their own
    "own modules": Script(
        "import argparse\nfrom model import Net\nfrom data import batches\n\n"
        "if __name__ == '__main__':\n    print(sum(Net()(batch).sum().item() > 9 for batch in batches()))\n",
        "torch numpy torch.nn torch",
        files={
            "model.py": "import torch\nimport numpy\nfrom torch.nn import Linear\n\n\n"
            "class Net(torch.nn.Module):\n    width: int = 4\n    def __init__(self, bias=True):\n"
            "        super().__init__()\n        self.layer = Linear(self.width, 1, bias)\n"
            "    def forward(self, x: torch.Tensor) -> torch.Tensor:\n        return self.layer(x)\n",
            "data.py": "import torch\ndef batches():\n    yield torch.ones(2, 4)\n",
        },
    ),
    "own module that sets a variable": Script(
        "from setup_env import setup\nimport torch\n" + MAIN,
        "",
        "setup_env.py:2: os.environ",
        files={"setup_env.py": "import os\nos.environ['NCCL_DEBUG'] = 'WARN'\ndef setup(): pass\n"},
    ),
    "own package": Script(
        "from lib.models import Net\nfrom lib import config, data\nprint(config.SIZE, data.load(), Net().layer)\n",
        "torch numpy torch.nn",
        files={
            "lib/__init__.py": "VERSION = '1'\nfrom . import config\n",
            "lib/config.py": "from dataclasses import dataclass, field\nSIZE = 4\n@dataclass\nclass Config:\n"
            "    size: int = SIZE\n    names: list = field(default_factory=list)\n",
            "lib/models/__init__.py": "from .net import Net\n__all__ = ['Net']\n",
            "lib/models/net.py": "import torch\nfrom ..data import load\nimport torch.nn as nn\n\n\n"
            "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            "        self.layer = nn.Linear(4, 1)\n",
            "lib/data.py": "import numpy as np\ndef load(): return float(np.ones(3).sum())\n",
        },
    ),
    "directory without __init__": Script(
        "from utils.seed import fix\nimport torch\nfix()\n" + MAIN,
        "numpy torch",
        files={"utils/seed.py": "import random\nimport numpy as np\ndef fix(): random.seed(0); np.random.seed(0)\n"},
    ),
    "module": Script(
        "from . import tools\nimport torch\nfrom .tools import double\nprint(double(torch.ones(1)).item())\n",
        "numpy torch",
        files={"pkg/__init__.py": "", "pkg/tools.py": "import numpy as np\ndef double(x): return 2 * x\n"},
        program="pkg/train.py",
        module="pkg.train",
    ),
    "package with __main__": Script(
        "from app.cli import run\nif __name__ == '__main__':\n    run()\n",
        "torch",
        files={"app/__init__.py": "", "app/cli.py": "import torch\ndef run(): print(torch.ones(1).item())\n"},
        program="app/__main__.py",
        module="app",
    ),
    "own module in the place of torch": Script(
        "import torch\nprint(torch.ones)\n", "numpy", files={"torch.py": "import numpy\nones = 7\n"}
    ),
    # ---- as in Lightning
    "lightning": Script(
        "import torch\nimport lightning as L\nfrom torch import nn\n" + MAIN,
        "torch",
        "lightning reads the worker's rank",
    ),
    "pytorch_lightning": Script(
        "import os\nimport pytorch_lightning as pl\nimport torch\n" + MAIN,
        "",
        "pytorch_lightning reads the worker's rank",
    ),
    "torchmetrics": Script(
        "import torch\nfrom torchmetrics import Accuracy\nimport numpy\n" + MAIN,
        "torch",
        "torchmetrics reads the worker's",
    ),
    # ---- as in accelerate and transformers
    "accelerate": Script(
        "import argparse\nimport torch\nfrom accelerate import Accelerator\nfrom torch.optim import AdamW\n"
        "from tqdm.auto import tqdm\n\nMAX_BATCH = 16\n" + MAIN,
        "torch accelerate torch.optim",
    ),
    "trainer": Script(
        "#!/usr/bin/env python\n# coding=utf-8\nimport logging\nimport os\nimport sys\n"
        "from dataclasses import dataclass, field\nfrom typing import Optional\n\nimport torch\nimport transformers\n"
        "from transformers import HfArgumentParser, TrainingArguments, set_seed\n"
        "from transformers.trainer_utils import get_last_checkpoint\n\nlogger = logging.getLogger(__name__)\n\n\n"
        "@dataclass\nclass Arguments:\n    name: Optional[str] = field(default=None, metadata={'help': 'a name'})\n"
        + MAIN,
        "torch transformers transformers transformers.trainer_utils",
    ),
    "trainer that checks versions first": Script(
        "import transformers\nfrom transformers.utils import check_min_version\ncheck_min_version('4.0.0')\n"
        "import torch\n" + MAIN,
        "transformers transformers.utils",
        "train.py:3: check_min_version",
    ),
    "datasets": Script(
        "import torch\nimport datasets\nfrom datasets import load_dataset\n" + MAIN,
        "torch datasets datasets",
        needs="datasets",
    ),
    "tracker": Script("import torch\nimport wandb\n" + MAIN, "torch", needs="wandb"),
    # ---- others
    "sklearn and scipy": Script(
        "from sklearn.datasets import load_digits\nfrom scipy import stats\nimport numpy as np\n"
        "print(load_digits().data.shape, float(stats.norm.cdf(0)))\n",
        "sklearn.datasets scipy numpy",
    ),
    "pandas": Script("import pandas as pd\nprint(pd.Series([1]).sum())\n", "pandas", needs="pandas"),
    "nothing slow": Script("import json, os, sys\nprint(json.dumps({'rank': 0}))\n", "", COLD),
}
