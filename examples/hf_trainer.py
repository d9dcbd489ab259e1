"""A script in the style of Hugging Face's examples. It knows nothing of its launcher.

    elastic-run --standalone --nproc-per-node 2 --max-restarts 3 examples/hf_trainer.py --output_dir out --max_steps 20

The Trainer finds the ranks in the environment. A tiny random model and random text stand in for yours, so that nothing
is downloaded. Trainer's own checkpoints make it elastic: after a restart it resumes from the latest.
"""

from __future__ import annotations

import os

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


class RandomText(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(100, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def main() -> None:
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    shape = GPT2Config(vocab_size=100, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(shape)
    trainer = Trainer(model=model, args=arguments, train_dataset=RandomText())
    folder = arguments.output_dir  # rank 0 may not have made it yet
    last = get_last_checkpoint(folder) if os.path.isdir(folder) else None  # type: ignore[no-untyped-call]
    result = trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        print(f"steps {result.global_step}, ranks {arguments.world_size}", flush=True)


if __name__ == "__main__":
    main()
