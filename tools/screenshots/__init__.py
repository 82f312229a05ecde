"""Pictures of a run's dashboards and report, taken in headless Chromium."""
