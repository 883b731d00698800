"""Infrastructure of long jobs: launch, collectives, locks, watchdog, signals, records, durable files."""
