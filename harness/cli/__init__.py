"""Run the command line `wg-interop`: run, coverage, probe, doctor, install, clean."""
