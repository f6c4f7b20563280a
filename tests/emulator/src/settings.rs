//! How the store behaves.

use std::time::Duration;

/// How the store behaves. A change holds for requests that begin after it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// From the last byte of a request to the first of its answer. The clock has steps of 1 ms.
    pub first_byte: Duration,
    /// Added to it: evenly between none and this.
    pub jitter: Duration,
    /// Bytes per second of one connection, in each direction; `None`: no limit.
    pub bandwidth: Option<u64>,
    /// How conditions of PutObject are kept.
    pub conditions: Conditions,
    /// The store answers nothing right now.
    pub outage: Option<Outage>,
    /// Seconds by which the store's clock is ahead of this machine's.
    pub clock_ahead_s: i64,
    /// The region that signatures must name.
    pub region: String,
    /// The client that may use the store; `None`: requests need no signature.
    pub access: Option<Access>,
    /// Whether bodies are compared with their SHA-256, which costs a CPU about 1 s for 2 GB.
    pub checks_bodies: bool,
    /// For so long after its creation, an object is missing in lists. S3 has no such time.
    pub list_delay: Duration,
}

/// A client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// Names the client.
    pub key: String,
    /// What it signs with.
    pub secret: String,
}

/// How conditions of PutObject are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conditions {
    /// As S3: of several requests at the same time, one makes the object.
    Atomic,
    /// Checked when the request begins: of several at the same time, all succeed.
    Raced,
    /// Not at all.
    Ignored,
}

/// A store that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outage {
    /// Every connection is reset, those that are open at once.
    Reset,
    /// Requests wait for the end of the outage, as when packets are lost, and are done then.
    Hang,
    /// Every request is answered with 503 ServiceUnavailable.
    Unavailable,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            first_byte: Duration::ZERO,
            jitter: Duration::ZERO,
            bandwidth: None,
            conditions: Conditions::Atomic,
            outage: None,
            clock_ahead_s: 0,
            region: "us-east-1".to_owned(),
            access: Some(Access { key: "emulated".to_owned(), secret: "secret".to_owned() }),
            checks_bodies: true,
            list_delay: Duration::ZERO,
        }
    }
}
