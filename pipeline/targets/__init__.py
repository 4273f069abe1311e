"""Target sets from cached scores: calibration learnt, teachers and contexts averaged, fidelity."""
