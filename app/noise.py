"""Messages of Lightning and torch that are true, harmless, and bury the lines a user should read.

Each is listed with the reason why it does not matter here; whatever is not listed is shown.
"""

import logging
import re
import warnings

LOGGED = {
    r"Seed set to": "the seed is in config.yaml",
    r"(GPU|TPU|HPU) available": "the start-up table names the device",
    r"Tip: ": "advertisements of Lightning's own products",
    r"distributed_backend=": "true of every run: one process is a group too",
    r"Initializing distributed": "the same",
    r"Restoring states from|Restored all states|Loaded model weights": "said by us in one line",
    r"`Trainer.fit` stopped": "a run ends at its last step",
    r"Loading `train_dataloader` to estimate": "how Lightning counts the steps",
    r"`weights_only` was not set": "we never load anything but plain values",
}
WARNED = {
    r".*does not have many workers.*": "rows come from memory maps; workers are a choice",
    r".*in eval mode at the start of training.*": "the module decides what is frozen",
    r".*isinstance\(treespec, LeafSpec\).*": "inside Lightning; concerns its developers",
    r".*The number of training batches.*is smaller than the logging interval.*": "log_every_n_steps counts steps",
    r".*`enable_validation`.*": "a run without validation data is asked for by limit_val_batches: 0",
    r".*Please use DTensor instead and we are deprecating ShardedTensor.*": "inside torch's own checkpoint code",
    r".*torch\.distributed is (disabled|unavailable|uninitialized).*": "inside torch's own checkpoint code",
    r".*You have overridden `on_before_batch_transfer`.*": "the stage knows which positions are targets",
    r".*It is recommended to use `self.log\(.*sync_dist=True.*": "the modules add up counts over ranks themselves",
    r"FSDP2-wrapped module .* returned a view tensor.*": "no module of ours changes another's output in place",
    r".*your dataloader is not resumable.*": "the datamodule saves what was handed out, and goes on from there",
    r".*find unused parameters.*": "concerns DDP",
    r".*barrier\(\): using the device under current context.*": "the device is set by the strategy",
    r".*Guessing device ID based on global rank.*": "the same",
    r".*JsonargparseDeprecationWarning.*": "concerns Lightning's developers",
}


def silence() -> None:
    """Hide the messages listed here, in this process."""
    for pattern in WARNED:
        warnings.filterwarnings("ignore", message=pattern)
    listed = re.compile("|".join(LOGGED))
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(lambda record: not listed.search(record.getMessage()))
