"""Schedules on one machine by Prefect: `ddpm retrain` called at its times, with a page that shows each run. No guarantee lives only here."""
