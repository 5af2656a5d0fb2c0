"""As much of Comet and ClearML as memwatch calls, with the signatures that they publish."""

from __future__ import annotations

import logging

from support.read_trackers import pixels


class Comet:
    """As much of ``comet_ml.Experiment`` as is used, with its signatures."""

    def __init__(self):
        self.images, self.texts = [], []

    def log_image(
        self,
        image_data,
        name=None,
        overwrite=False,
        image_format="png",
        image_scale=1.0,
        image_shape=None,
        image_colormap=None,
        image_minmax=None,
        image_channels="last",
        copy_to_tmp=True,
        step=None,
        annotations=None,
        metadata=None,
    ):
        self.images.append((name, step, pixels(image_data), metadata["caption"]))

    def log_text(self, text, step=None, metadata=None):
        self.texts.append((text, step, metadata["key"]))


class ClearML:
    """As much of ``clearml.Task`` and ``clearml.Logger`` as is used, with their signatures."""

    def __init__(self):
        self.images, self.texts = [], []

    def get_logger(self):
        return self

    def report_image(
        self,
        title,
        series,
        iteration=None,
        local_path=None,
        image=None,
        matrix=None,
        max_image_history=None,
        delete_after_upload=False,
        url=None,
    ):
        assert max_image_history < 0  # otherwise it keeps the last few
        self.images.append((f"{title}/{series}", iteration, pixels(image), title))

    def report_text(self, msg, level=logging.INFO, print_console=True, *args, **_):
        assert not print_console  # memwatch has printed it
        self.texts.append((msg, None, None))
