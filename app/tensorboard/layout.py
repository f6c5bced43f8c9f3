"""What our page of TensorBoard shows: few charts, grouped by the question they answer.

A run writes some hundred curves; a person has ten seconds. So the first group must do; the others say why. A chart is
on the page only where a run has measured one of its curves, and a group only where it has a chart: what nobody looked
at must not look healthy. Curves are named by patterns, not by layer or source, so that the layout fits every run.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart."""

    title: str
    curves: str
    """Regular expression of the whole names of its curves."""
    names: dict[str, str] = field(default_factory=dict)
    """Curve -> its name in the chart, where what its name does not share with the others' is not enough."""
    note: str = ""
    """Unit, and what a healthy value is."""
    share: bool = False
    """Whether values are told in percent."""
    axis: tuple[float, ...] = ()
    """Numbers that the y axis reaches, whatever was measured: the difference of 0.1% and 0.2% is no mountain."""
    references: dict[str, float | str] = field(default_factory=dict)
    """What the curves are held against: what it is -> a number, or the name of the curve that has it."""
    above: float | None = None
    """A newest value above this is worth a look, and said on top of the page."""
    below: float | None = None
    """So is one below this."""


LAYER = "(layer|mtp)_.*"
LAYOUT: dict[str, list[Chart]] = {
    "Is it good, and is it healthy?": [
        Chart(
            title="Held-out bits per byte",
            curves="validation/bits_per_byte",
            note="lower is better",
            references={"gzip -9": "reference/gzip_bits_per_byte"},
        ),
        Chart(
            title="Held-out problems answered right",
            curves="validation/exact_match(/.*)?",
            names={"validation/exact_match": "mean"},
            note="share of each environment; higher is better",
            share=True,
            axis=(0, 1),
        ),
        Chart(
            title="Loss, training and held-out",
            curves="training/next_token_loss|validation/loss",
            names={"training/next_token_loss": "training", "validation/loss": "held-out"},
            note="nats per token; a gap: it learns by heart",
        ),
        Chart(
            title="Gradient norm",
            curves="training/gradient_norm",
            note="before clipping; should settle, not climb",
            axis=(0,),
            references={"clipped above": "reference/gradient_clip_norm"},
        ),
        Chart(
            title="Skipped steps",
            curves="training/skipped_steps",
            note="of the whole run; healthy: 0",
            axis=(0, 4),
            above=0,
        ),
        Chart(
            title="Busiest expert",
            curves="experts/load_max_over_mean/worst",
            note="its tokens over the mean, worst layer",
            axis=(0, 4),
            references={"even load": 1},
            above=4,
        ),
        Chart(
            title="Dead experts",
            curves="experts/dead_fraction/worst",
            note="share without a token, worst layer; healthy: 0",
            share=True,
            axis=(0, 0.5),
            above=0.25,
        ),
        Chart(
            title="Tokens per second",
            curves="training/tokens_per_second",
            note="of all devices, pauses aside",
            axis=(0,),
        ),
        Chart(
            title="Waiting for data",
            curves="speed/data_wait_share",
            note="share of a step; healthy: next to 0",
            share=True,
            axis=(0, 0.2),
            above=0.1,
        ),
    ],
    "Why does it learn, or not?": [
        Chart(title="Learning rate", curves="training/learning_rate", axis=(0,)),
        Chart(title="Loss of each MTP depth", curves="training/mtp_loss_.*", note="nats per token"),
        Chart(
            title="Drafts kept",
            curves="validation/draft_acceptance_.*",
            note="at each position, where all before it were kept",
            share=True,
            axis=(0, 1),
        ),
        Chart(
            title="Drafts kept in answers to problems",
            curves="validation/replies/draft_acceptance_.*",
            note="at each position, where all before it were kept",
            share=True,
            axis=(0, 1),
        ),
        Chart(
            title="Answers that could not be judged",
            curves="validation/judgement_failures",
            note="of an evaluation: the checker raised or took too long; healthy: 0",
            axis=(0, 4),
            above=0,
        ),
        Chart(
            title="Skipped steps by reason",
            curves="training/skipped_(not_finite|loss_spikes|gradient_spikes)",
            note="of the whole run; healthy: 0",
            axis=(0, 4),
        ),
        Chart(
            title="Loss and gradient norm, how far out",
            curves="training/(loss|gradient)_sigmas",
            note="standard deviations above the steps before",
            references={"skipped above": "reference/spike_sigmas"},
        ),
    ],
    "Is it fast?": [
        Chart(title="MFU", curves="speed/mfu", note="share of the peak of the devices", share=True, axis=(0, 1)),
        Chart(
            title="A step, part by part",
            curves="speed/seconds/(data_wait|forward|backward|optimizer|other)",
            note="seconds",
            axis=(0,),
        ),
        Chart(title="Memory", curves="memory/.*", note="GiB, worst device", axis=(0,)),
        Chart(
            title="Validation, sampling, checkpoints",
            curves="speed/pause_share",
            note="share of all time since the last point",
            share=True,
            axis=(0, 1),
        ),
    ],
    "Are the experts healthy?": [
        Chart(
            title="Variation of the load",
            curves="experts/load_variation/worst",
            note="standard deviation over mean, worst layer",
            axis=(0,),
            references={"even load": 0},
        ),
        Chart(
            title="Router entropy",
            curves="experts/router_entropy/worst",
            note="in the worst layer",
            axis=(0,),
            references={"undecided": 1, "collapsed": 0},
            below=0.2,
        ),
        Chart(
            title="Spread of the router bias",
            curves="experts/bias_spread/worst",
            note="largest minus smallest, worst layer; should settle",
            axis=(0,),
        ),
    ],
    "Is training in few bits healthy?": [
        Chart(
            title="Underflow by operand",
            curves="quantization/underflow/.*/worst",
            note="share that becomes zero, worst module",
            share=True,
            axis=(0, 0.1),
        ),
        Chart(
            title="Saturation by operand",
            curves="quantization/saturation/.*/worst",
            note="share that is clipped, worst module; healthy: 0",
            share=True,
            axis=(0, 0.02),
            above=0.01,
        ),
        Chart(
            title="Signal to quantisation noise",
            curves="quantization/snr_db/.*/worst",
            note="dB, worst module; NVFP4 has 17 to 20",
            axis=(10, 25),
            below=12,
        ),
    ],
    "Do all weights learn?": [
        Chart(
            title="Weights without any gradient",
            curves="gradients/dead_weights",
            note="number, single experts too; healthy: 0",
            axis=(0, 4),
            above=0,
        ),
        Chart(
            title="Gradients that are exactly zero",
            curves="gradients/zero_share/(all|worst)",
            note="share of all weights, and in the worst module",
            share=True,
            axis=(0, 0.5),
        ),
        Chart(
            title="Decayed channels",
            curves="weights/decayed_channels/worst",
            note="share, worst module; healthy: 0",
            share=True,
            axis=(0, 0.1),
            above=0,
        ),
    ],
    "Is the data right?": [
        Chart(
            title="Mixture",
            curves="data/share_(asked|read)/.*",
            note="share of rows asked of each source, and read",
            share=True,
            axis=(0, 1),
        ),
        Chart(
            title="Mixture, asked minus read",
            curves="data/mixture_error",
            note="largest difference of a source; healthy: 0",
            share=True,
            axis=(0, 0.1),
            above=0.05,
        ),
        Chart(title="Epochs of each source", curves="data/epochs/.*", note="how often it was read", axis=(0, 1)),
        Chart(title="Packing", curves="data/packing_use", note="share of positions with text", share=True, axis=(0, 1)),
    ],
    "Layer by layer": [
        Chart(title="Residual stream behind each layer", curves="residual/rms/.*", note="RMS", axis=(0,)),
        Chart(
            title="Busiest expert, by layer",
            curves=f"experts/load_max_over_mean/{LAYER}",
            axis=(0,),
            references={"even load": 1},
        ),
        Chart(title="Dead experts, by layer", curves=f"experts/dead_fraction/{LAYER}", share=True, axis=(0, 0.5)),
        Chart(title="Router entropy, by layer", curves=f"experts/router_entropy/{LAYER}", axis=(0, 1)),
        Chart(title="Spread of the router bias, by layer", curves=f"experts/bias_spread/{LAYER}", axis=(0,)),
        Chart(
            title="Underflow of the inputs, forward pass",
            curves=rf"quantization/underflow/fprop\.x/{LAYER}",
            share=True,
            axis=(0, 0.1),
        ),
        Chart(
            title="Underflow of the gradients, for those of the inputs",
            curves=rf"quantization/underflow/dgrad\.g/{LAYER}",
            share=True,
            axis=(0, 0.1),
        ),
        Chart(
            title="Gradients that are exactly zero, by module",
            curves=f"gradients/zero_share/{LAYER}",
            share=True,
            axis=(0, 0.5),
        ),
        Chart(
            title="Decayed channels, by module",
            curves=f"weights/decayed_channels/{LAYER}",
            share=True,
            axis=(0, 0.1),
        ),
    ],
}
"""Question -> charts."""
