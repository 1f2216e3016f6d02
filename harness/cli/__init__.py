"""Run the command line `wg-interop`: run, probe, doctor, install, mutants, clean."""
