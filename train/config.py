"""Options of every training: the run, and AdamW with its schedules; free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xcit_dino.errors import InputError, needs, within

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
Device = Literal["auto", "cuda", "mps", "cpu"]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedules; names and defaults are those of DINO's ``main_dino.py``."""

    lr: float = 0.0005
    """Peak learning rate for batch size 256; scaled linearly with the global batch (DINO's
    rule)."""
    min_lr: float = 1e-6
    """Learning rate at the end of training; not scaled."""
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up from ``warmup_lr``."""
    warmup_lr: float = 0.0
    """Learning rate at step 0; not scaled."""
    weight_decay: float = 0.04
    """Weight decay at the start; none on biases, norms, `temperature` and `cls_token`."""
    weight_decay_end: float = 0.4
    """Weight decay at the end (cosine)."""
    clip_grad: float = 3.0
    """Maximum gradient norm: per parameter in pretraining (as DINO), over all parameters in
    finetuning and distillation (as DeiT and XCiT); 0 disables clipping."""
    layer_decay: float = 1.0
    """A layer's learning rate is that of the head times this, once for each layer that it lies
    below the head (BEiT); 1: all the same."""

    def __post_init__(self) -> None:
        within(self, 0.01, 1, "layer_decay")
        within(self, 0, 1e3, "lr", "min_lr", "warmup_lr", "weight_decay", "weight_decay_end")
        within(self, 0, 1e6, "warmup_epochs", "clip_grad")

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        return needs(self.warmup_epochs, "with --warmup_epochs 0", "warmup_lr")

    def remarks(self, epochs: int) -> list[str]:
        """Warnings about unexpected effects of the schedules over ``epochs`` epochs, one per
        line."""
        if self.warmup_epochs < epochs:
            return []
        given = f"--warmup_epochs {self.warmup_epochs:g} with --epochs {epochs}"
        if self.warmup_epochs == epochs:
            return [f"{given}: the learning rate rises to the end of the run, and never falls"]
        share = epochs / self.warmup_epochs
        return [f"{given}: the run ends at {share:.0%} of the learning rate's way to its peak"]


@dataclass(frozen=True)
class RunConfig:
    """Run folder, duration, batch, precision, checkpoints and logging."""

    output_dir: Path = Path("runs/default")
    """The run folder: config, checkpoints, metrics, results, report."""
    epochs: int = 100
    """Number of passes over the data."""
    batch_size_per_gpu: int = 64
    """Images per micro-batch of each process."""
    accum_iter: int = 1
    """Micro-batches per step; the global batch is batch_size_per_gpu x accum_iter x processes."""
    fsdp: bool = False
    """Split weights, their averages, gradients and moments over the processes (FSDP2) instead of
    keeping them in each: for models that leave too little memory. Not with --precision fp16."""
    seed: int = 0
    """Seed of weights, data order, augmentation and drop-path."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of the forward pass; weights stay fp32. auto: bf16 if supported, else fp32."""
    device: Device = "auto"
    """auto: cuda if available, else cpu; mps: the GPU of a Mac, not yet tried on one."""
    saveckp_freq: int = 20
    """Epochs between checkpoints that are kept permanently, besides the newest ones."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    checkpoint_minutes: float = 10.0
    """Minutes between additional checkpoints; 0 saves only at epoch ends."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl, TensorBoard and the other loggers."""
    logger: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Dashboards that show the run, besides metrics.jsonl: one run over all attempts, results
    included. wandb and mlflow are told by their own environment variables where to write."""
    max_skipped: int = 20
    """Maximum consecutive steps skipped for non-finite gradients."""
    on_nonfinite: Literal["rollback", "stop"] = "rollback"
    """After --max_skipped steps: roll back to the last checkpoint with half the learning rate
    (three times at most), or stop."""
    watchdog_minutes: float = 10.0
    """Minutes without a step after which each rank's phase and stacks are reported; 0 disables
    it."""
    on_stall: Literal["warn", "abort"] = "warn"
    """abort: after twice --watchdog_minutes the process exits, so that a launcher restarts it."""
    max_steps: int = 0
    """Stop (resumably) after this optimizer step; 0 runs to the end. Schedules are unaffected."""
    may_change: tuple[str, ...] = ()
    """Options that may differ from those of the existing run."""

    def __post_init__(self) -> None:
        within(self, 1, 1e6, "epochs", "batch_size_per_gpu", "accum_iter")
        within(self, 1, 1e9, "saveckp_freq", "keep_checkpoints", "log_every", "max_skipped")
        within(self, 0, 2**31, "seed")
        within(self, 0, 1e12, "checkpoint_minutes", "watchdog_minutes", "max_steps")
        if self.fsdp and self.precision == "fp16":
            raise InputError("--fsdp: --precision fp16 is not supported; take bf16 or fp32")

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        return needs(self.watchdog_minutes, "with --watchdog_minutes 0", "on_stall")

    def last_step(self, total_steps: int) -> int:
        """The optimizer step after which training stops, at the latest ``total_steps``."""
        return min(total_steps, self.max_steps or total_steps)
