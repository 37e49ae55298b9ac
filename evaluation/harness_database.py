"""The SQLite database in which vla-eval keeps its work queue and the results of episodes."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..decoding_openvla import NoActionError

EVAL_ID = "openvla"  # name of the evaluation in the harness


def database_path(output: Path) -> Path:
    """Return the path of the database of an evaluation's output folder."""
    return output.resolve() / f"recording-{EVAL_ID}.sqlite"


def requeue_unfinished(output: Path) -> int:
    """Put episodes that were claimed but not finished, or that ended in an error, back into the queue.

    Returns:
        The number of episodes that are done.
    """
    for unfinished in (output / "episodes").glob(".recorder-*"):
        unfinished.unlink()
    if not database_path(output).is_file():
        return 0
    with contextlib.closing(sqlite3.connect(database_path(output))) as database, database:
        # Items are numbered task by task, as the harness lists them; the newest result of an episode counts.
        database.execute(
            "UPDATE work_queue SET done = 0 WHERE EXISTS (SELECT 1 FROM episode_results AS r WHERE r.status = 'error' "
            f"AND coalesce(r.failure_detail, '') NOT LIKE '%{NoActionError.__name__}%' "
            "AND json_extract(r.context, '$.task_idx') = work_queue.task_idx AND r.episode_id = work_queue.item - "
            "(SELECT MIN(item) FROM work_queue AS w WHERE w.task_idx = work_queue.task_idx) "
            "AND r.rowid = (SELECT MAX(rowid) FROM episode_results AS n WHERE n.episode_id = r.episode_id "
            "AND json_extract(n.context, '$.task_idx') = json_extract(r.context, '$.task_idx')))"
        )
        database.execute("UPDATE work_queue SET shard_id = NULL WHERE done = 0")
        return database.execute("SELECT COUNT(*) FROM work_queue WHERE done = 1").fetchone()[0]


def read_episodes(output: Path, tasks: Sequence[int], first_initial_state: int) -> list[dict[str, Any]]:
    """Return the newest result of every episode, in the order of ``tasks`` and of the initial states.

    An episode that ended because the model predicted no action (``NoActionError``) is a failure, not an error;
    ``no_action`` has the message.
    """
    if not database_path(output).is_file():
        return []
    with contextlib.closing(sqlite3.connect(database_path(output))) as database:
        results = database.execute(
            "SELECT context, episode_id, status, steps, elapsed_sec, failure_detail, jsonl_path FROM episode_results "
            "WHERE rowid IN (SELECT MAX(rowid) FROM episode_results "
            "GROUP BY json_extract(context, '$.task_idx'), episode_id)"
        ).fetchall()
    episodes = []
    for context, episode_id, status, steps, seconds, detail, path in results:
        error = detail.strip().splitlines()[-1] if detail else "?" if status == "error" else None
        no_action = error if error and NoActionError.__name__ in error else None
        episodes.append(
            {
                "task": json.loads(context)["task_id"],
                "initial_state": first_initial_state + episode_id,
                "success": status == "success",
                "steps": steps,
                "seconds": seconds,
                "video": str(Path(path).with_suffix(".mp4")),
                "error": None if no_action else error,
                "no_action": no_action,
            }
        )
    return sorted(episodes, key=lambda episode: (tasks.index(episode["task"]), episode["initial_state"]))
