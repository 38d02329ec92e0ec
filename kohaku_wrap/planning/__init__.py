"""Steps, memory, disk, time, module counts and the doctor: what is known of a training before it starts."""
