#!/usr/bin/env bash
# PyAV 18.1.0: frames that CodecContext.decode(None) flushes out of a decoder have the time NaN.
#
# Ten frames of h264 at 10 Hz are decoded packet by packet; the decoder holds the last ones back until it is flushed.
#
# Expected: Frame.time in seconds for every frame, as Container.decode gives.
# Seen: frames that are returned for a packet have it; flushed ones have no time base, so their time is NaN, which
#   compares as unequal and not later with every time asked for. Their pts is right: times stream.time_base it is the time.
#
# Output seen:
#   PyAV 18.1.0: returned for packets: [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]; flushed: [nan, nan], by pts [0.8, 0.9]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/try.py" <<'END'
import math
import sys

import av
import numpy as np

path = sys.argv[1] + "/video.mp4"
with av.open(path, "w") as container:
    stream = container.add_stream("libx264", rate=10, options={"bf": "2", "b_strategy": "0"})
    stream.width = stream.height = 64
    for level in range(10):
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * level, np.uint8))))
    container.mux(stream.encode(None))
with av.open(path) as container:
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    returned = [frame.time for packet in container.demux(stream) if packet.size for frame in packet.decode()]
    flushed = stream.codec_context.decode(None)
    times = [float(frame.pts * stream.time_base) for frame in flushed]
    seen = [frame.time if frame.time is not None else math.nan for frame in flushed]
    returned, times = ([round(time, 3) for time in group] for group in (returned, times))
    print(f"PyAV {av.__version__}: returned for packets: {returned}; flushed: {seen}, by pts {times}")
raise SystemExit(not seen or not all(map(math.isnan, seen)))
END
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6
"$folder/venv/bin/python" "$folder/try.py" "$folder" || { echo "changed: the time of flushed frames" >&2; exit 1; }
