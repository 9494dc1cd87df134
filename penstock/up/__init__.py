"""Everything on one machine: one data folder, one supervisor, Postgres, NATS and the five services."""
