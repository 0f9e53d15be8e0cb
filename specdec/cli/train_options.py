"""Options of `specdec train`: those of every use, of draft models, and of learning from a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.cli.options import MACHINE, ON_OR_OFF, within
from specdec.train.on_policy import TEXTS
from specdec.train.recipe import DEFAULTS

DRAFT, ONLINE = "Draft models", "Online: learning from a stream of prompts"

Kind = Annotated[str, typer.Argument(help=f"What to train: {', '.join(DEFAULTS)}.", show_default=False)]
Data = Annotated[
    list[str],
    typer.Argument(
        help="What [bold]specdec data prepare[/bold] made; or text, JSON lines, Parquet, a folder or a data set, "
        "which are prepared into OUT/data. With --online, files of prompts, in order.", show_default=False,
    ),
]  # fmt: skip
OutFolder = Annotated[
    Path,
    typer.Option(
        "--out", "-o", help="Directory of the run; an unfinished run in it is gone on with.", show_default=False
    ),
]
RecipeFile = Annotated[
    Path | None, typer.Option(help="Settings in TOML, over the kind's defaults.", show_default=False)
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Any setting, as in [bold]--set objective.divergence=jsd:0.5[/bold].", show_default=False
    ),
]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps; of each update with --online.", show_default=False)]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Highest learning rate.", show_default=False)]
BatchRows = Annotated[int | None, typer.Option(help="Rows of one step, all processes.", show_default=False)]
RowsAtOnce = Annotated[
    int | None, typer.Option(help="Rows of one forward; the rest of a step is accumulated.", show_default=False)
]
RowLength = Annotated[int | None, typer.Option(help="Tokens of a row.", show_default=False)]
Seed = Annotated[int | None, typer.Option(help="Of fresh weights, data order and noise.", show_default=False)]
Bf16 = Annotated[
    bool | None,
    typer.Option(
        "--bf16/--no-bf16", help="Autocast; weights stay in float32.", rich_help_panel=ON_OR_OFF, show_default=False
    ),
]
SaveEvery = Annotated[
    int | None, typer.Option(help="Steps between checkpoints; requests with --online.", show_default=False)
]
EvaluateEvery = Annotated[int | None, typer.Option(help="Steps between validations.", show_default=False)]
Temperature = Annotated[
    float | None, typer.Option(help="Of validation, or of the stream; 0 is greedy.", show_default=False)
]
Divergence = Annotated[
    str | None,
    typer.Option(
        help="forward-kl, reverse-kl, jsd:BETA, tv, nla, adaptive or ce; from the target's law.", show_default=False
    ),
]
Prompts = Annotated[
    Path | None, typer.Option(help="Held-out prompts: JSON lines, or text with one a line.", show_default=False)
]
Features = Annotated[
    Path | None,
    typer.Option(help="The target's states from [bold]specdec data features[/bold].", show_default=False),
]
BeginFrom = Annotated[
    str | None, typer.Option("--from", help="Begin with the weights of this drafter, or run.", show_default=False)
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Refuse an --out that holds checkpoints.")]
GradientCheckpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing", help="Make logits and states again instead of keeping them: less memory.",
        rich_help_panel=MACHINE,
    ),
]  # fmt: skip
Processes = Annotated[int, typer.Option(callback=within(1), help="Processes on this machine.", rich_help_panel=MACHINE)]
Fsdp = Annotated[
    bool | None,
    typer.Option(
        "--fsdp/--no-fsdp", help="Share weights, gradients and moments among processes.", rich_help_panel=ON_OR_OFF,
        show_default=False,
    ),
]  # fmt: skip
ReportTo = Annotated[
    list[str] | None, typer.Option(help="Also report to tensorboard, wandb or trackio.", show_default=False)
]
Hub = Annotated[
    str | None, typer.Option("--push-to-hub", help="Upload the best drafter as OWNER/NAME.", show_default=False)
]
Plan = Annotated[bool, typer.Option("--plan", help="Say what would be done and needed, and do nothing.")]
JsonReports = Annotated[bool, typer.Option("--json", help="Print one JSON object for each report on stdout.")]

Text = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(TEXTS), help="Whose text is learned from: the data's, or what a model writes on the way.",
        rich_help_panel=DRAFT, show_default=False,
    ),
]  # fmt: skip
KeepShare = Annotated[
    float | None,
    typer.Option(
        callback=within(0, 1), help="Learn only from so large a share of the tokens (AdaSPEC's filter).",
        rich_help_panel=DRAFT, show_default=False,
    ),
]  # fmt: skip
CutFrom = Annotated[
    str | None,
    typer.Option(
        metavar="target|DIR", help="Begin with a model cut out of this one, to --layers and --width.",
        rich_help_panel=DRAFT, show_default=False,
    ),
]  # fmt: skip
FromScratch = Annotated[
    bool,
    typer.Option("--from-scratch", help="Begin with a fresh model whose size is chosen here.", rich_help_panel=DRAFT),
]
Share = Annotated[
    float | None,
    typer.Option(
        help="Of a step of the target that a step of the fresh model may cost.  \\[default: 0.15]",
        rich_help_panel=DRAFT, show_default=False,
    ),
]  # fmt: skip
Layers = Annotated[
    int | None,
    typer.Option(callback=within(1), help="Of the cut or fresh model.", rich_help_panel=DRAFT, show_default=False),
]
Width = Annotated[
    int | None,
    typer.Option(
        callback=within(1), help="Hidden size of the cut or fresh model.", rich_help_panel=DRAFT, show_default=False
    ),
]
Pretrain = Annotated[
    str | None,
    typer.Option(
        metavar="DATA", help="Text that a fresh model learns first.", rich_help_panel=DRAFT, show_default=False
    ),
]
ContinueOn = Annotated[
    str | None,
    typer.Option(
        metavar="DATA", help="Text nearer to the use, before the answers in DATA.", rich_help_panel=DRAFT,
        show_default=False,
    ),
]  # fmt: skip

Online = Annotated[
    bool,
    typer.Option(
        "--online", help="DATA are prompts: decode them in order, and let the drafter of --from learn meanwhile.",
        rich_help_panel=ONLINE,
    ),
]  # fmt: skip
Static = Annotated[
    bool,
    typer.Option(
        "--static", help="Decode every prompt with the drafter as it was, too, and compare.", rich_help_panel=ONLINE
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens", "-n", callback=within(2), help="Of each request.  \\[default: 128]",
        rich_help_panel=ONLINE, show_default=False,
    ),
]  # fmt: skip
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat", help="With --online, whether prompts are questions for the target's chat template.",
        rich_help_panel=ON_OR_OFF, show_default=False,
    ),
]  # fmt: skip
LearnEvery = Annotated[
    int | None,
    typer.Option(
        callback=within(1), help="Tokens after which an update is due.  \\[default: 512]", rich_help_panel=ONLINE,
        show_default=False,
    ),
]  # fmt: skip
MaxAge = Annotated[
    float | None,
    typer.Option(
        callback=within(0), help="Seconds after which it is due anyway; 0, the default, for never.",
        rich_help_panel=ONLINE, show_default=False,
    ),
]  # fmt: skip
Background = Annotated[
    bool, typer.Option("--background", help="Learn in a thread of the lowest priority.", rich_help_panel=ONLINE)
]
ReplayShare = Annotated[
    float | None,
    typer.Option(
        help="Of an update's passages that are older ones.  \\[default: 0.5]", rich_help_panel=ONLINE,
        show_default=False,
    ),
]  # fmt: skip
TopK = Annotated[
    int | None,
    typer.Option(
        callback=within(0), help="Tokens kept of each of the target's laws; 0 for all.  \\[default: 64]",
        rich_help_panel=ONLINE, show_default=False,
    ),
]  # fmt: skip
