//! Makes log objects of what was written, and commits them in order.
