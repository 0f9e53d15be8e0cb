"""`specdec data`: regenerate, prepare, preview and cache what drafters are trained on."""

from __future__ import annotations

import typer

from specdec.cli.data_features import features
from specdec.cli.data_prepare import prepare
from specdec.cli.data_preview import preview
from specdec.cli.data_regenerate import regenerate

app = typer.Typer(rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]})

for _command in (prepare, preview, regenerate, features):
    app.command(_command.__name__)(_command)
