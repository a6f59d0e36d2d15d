"""Synthetic scenes: a made-up countryside seen from above, with LoveDA's seven classes at about LoveDA's frequencies.

They stand in for real data in the demo and the tests. numpy alone draws them, bit for bit the same for a seed; a scene
of 1024 x 1024 pixels (0.3 m each) takes about two seconds on one core.
"""

from in2nect.data.synthetic.dataset import write_synthetic_dataset
from in2nect.data.synthetic.scene import Scene, synthetic_scene

__all__ = ["Scene", "synthetic_scene", "write_synthetic_dataset"]
