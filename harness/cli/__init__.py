"""Run the command line `wg-interop`: run, doctor, install, clean."""
