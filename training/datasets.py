"""Training data of a run: the protocol that the training loop needs, and the datasets of ``FinetuneConfig.data``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from torch.utils.data import IterableDataset

from ..actions_openvla import nearest_name
from ..configuration_openvla import write_json
from ..data.episodes import EpisodeReader, Step
from ..data.mixtures import expanded_entries
from ..data.open import open_dataset
from ..data.statistics import require_names_differ, statistics_and_findings
from ..data.stream import StepStream, StreamPosition
from ..errors_openvla import OpenVLAValueError
from .config import FinetuneConfig

# Keys of an entry of FinetuneConfig.data.
DATA_ENTRY_KEYS = ("path", "weight", "name", "preset", "fields", "split")


class TrainingData(Protocol):
    """Training data of a run. Optional attributes: ``weights`` and ``findings``, as :class:`Demonstrations` has them.

    Attributes:
        statistics: Action and proprio statistics by dataset.
        readers: Datasets, which are checked against the statistics and described in data.json; may be empty.
    """

    statistics: dict[str, Any]
    readers: Sequence[EpisodeReader]

    @abstractmethod
    def stream(
        self,
        chunk_length: int,
        rank: int = 0,
        world_size: int = 1,
        position: StreamPosition | None = None,
        history_length: int = 1,
    ) -> IterableDataset[Step]:
        """Return an endless stream of the samples of one process, from ``position`` on."""


class Demonstrations:
    """The datasets of a run's ``config.data``.

    Attributes:
        statistics: Action and proprio statistics by dataset.
        findings: Findings of the data checks (``data.doctor``) by dataset.
        readers: The datasets.
        weights: Sampling weight of each dataset.

    Raises:
        OpenVLAValueError: There is no data, or an entry of it is not valid.
    """

    def __init__(self, config: FinetuneConfig) -> None:
        if not config.data:
            raise OpenVLAValueError("A run needs data: a dataset folder, or a list of mappings with their path.")
        entries = [{"path": config.data}] if isinstance(config.data, str) else expanded_entries(config.data)
        for entry in entries:
            _check_data_entry(entry)
        self.config = config
        self.weights = [float(entry.pop("weight", 1.0)) for entry in entries]
        self.readers: Sequence[EpisodeReader] = [
            open_dataset(entry.pop("path"), **{"preset": config.preset, **entry}) for entry in entries
        ]
        require_names_differ(self.readers)
        examined = {reader.name: statistics_and_findings(reader, skip_bad=config.skip_bad) for reader in self.readers}
        self.statistics: dict[str, Any] = {name: statistics for name, (statistics, _) in examined.items()}
        self.findings = {name: findings for name, (_, findings) in examined.items()}

    def stream(
        self,
        chunk_length: int,
        rank: int = 0,
        world_size: int = 1,
        position: StreamPosition | None = None,
        history_length: int = 1,
    ) -> StepStream:
        """Return an endless stream of the samples of one process.

        Args:
            chunk_length: Actions per sample.
            rank: Index of the process.
            world_size: Number of processes.
            position: Position in the data to start from; None: the beginning.
            history_length: Number of moments whose images a sample has.
        """
        stream = StepStream(
            self.readers,
            self.weights,
            chunk_length=chunk_length,
            pad_last_chunk=self.config.pad_last_chunk,
            shuffle_buffer=self.config.shuffle_buffer,
            seed=self.config.seed,
            rank=rank,
            world_size=world_size,
            skip_bad=self.config.skip_bad,
            history_length=history_length,
        )
        if position is not None:
            stream.resume_at(position)
        return stream


def _check_data_entry(entry: Mapping[str, Any]) -> None:
    """Raise OpenVLAValueError if an entry of ``FinetuneConfig.data`` has no path or unknown keys."""
    unknown = sorted(set(entry) - set(DATA_ENTRY_KEYS))
    if unknown or not entry.get("path"):
        nearest = nearest_name(unknown[0], list(DATA_ENTRY_KEYS)) if unknown else None
        hint = f" Did you mean {nearest!r}?" if nearest else ""
        raise OpenVLAValueError(
            f"An entry of data needs a path, and takes {list(DATA_ENTRY_KEYS[1:])}; got {dict(entry)}, unknown: "
            f"{unknown}.{hint}"
        )


def report_data(data: TrainingData, chunk_length: int, output_dir: Path) -> None:
    """Write to data.json, and print, what is trained on and what is left out of every dataset."""
    if not data.readers:
        return
    summary = cast(StepStream, data.stream(chunk_length)).summary()
    write_json(output_dir / "data.json", {"datasets": summary})
    for dataset in summary:
        left_out = ", ".join(
            f"{count} {reason.replace('_', ' ')}" for reason, count in dataset["left_out"].items() if count
        )
        print(
            f"{dataset['name']}: {dataset['episodes']} episodes, {dataset['samples']} samples, cameras "
            f"{', '.join(dataset['cameras'])}; left out: {left_out or 'nothing'}"
        )
        for note in dataset["notes"]:
            print(f"  {note}")
