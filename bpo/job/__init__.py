"""What surrounds any long job: launch, collectives, locks, watchdog, signals, records, durable files."""
