"""Load a policy, predict actions, play action chunks, apply a robot's conventions."""
