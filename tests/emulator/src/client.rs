//! A small client, for tests and for the limits of a store: one connection, one request at a time.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use hyper::HeaderMap;
use hyper::header::{HeaderName, HeaderValue};

use crate::date::Date;
use crate::request::{decode, encode};
use crate::settings::Access;
use crate::signature::{CONTENT_DIGEST, DATE, Scope, Signed, authorization, digest_of};

/// Longest wait for bytes.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A client with one connection, which it makes anew after an error.
#[derive(Debug)]
pub struct Client {
    address: SocketAddr,
    access: Option<Access>,
    region: String,
    clock_ahead_s: i64,
    timeout: Duration,
    connection: Option<BufReader<TcpStream>>,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Its status.
    pub status: u16,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Vec<u8>,
    /// From the request's last byte to the head of the answer.
    pub first_byte: Duration,
}

impl Client {
    /// A client of the store at this address, which signs if it has access.
    #[must_use]
    pub fn new(address: SocketAddr, access: Option<Access>) -> Self {
        let region = "us-east-1".to_owned();
        Self { address, access, region, clock_ahead_s: 0, timeout: TIMEOUT, connection: None }
    }

    /// The same, which waits no longer than that for bytes.
    #[must_use]
    pub fn patient_for(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// The same, for another region.
    #[must_use]
    pub fn in_region(self, region: &str) -> Self {
        Self { region: region.to_owned(), ..self }
    }

    /// The same, with a clock that is so much ahead.
    #[must_use]
    pub fn ahead(self, clock_ahead_s: i64) -> Self {
        Self { clock_ahead_s, ..self }
    }

    /// Sends a request and waits for its answer. `target` is `/bucket/key?name=value`, encoded.
    ///
    /// # Errors
    /// When the connection fails or the answer is no HTTP: the request may have been done.
    pub fn send(
        &mut self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> io::Result<Reply> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connect()?,
        };
        let head = self.head(method, target, headers, body)?;
        connection.get_mut().write_all(head.as_bytes())?;
        connection.get_mut().write_all(body)?;
        let sent = Instant::now();
        let reply = receive(&mut connection, method, sent)?;
        let closes = reply.headers.get("connection").is_some_and(|value| value == "close");
        self.connection = (!closes).then_some(connection);
        Ok(reply)
    }

    fn connect(&self) -> io::Result<BufReader<TcpStream>> {
        let stream = TcpStream::connect(self.address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(self.timeout))?;
        stream.set_write_timeout(Some(self.timeout))?;
        Ok(BufReader::with_capacity(256 << 10, stream))
    }

    fn head(
        &self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> io::Result<String> {
        let wrong = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let mut all = HeaderMap::new();
        let date = Date::now(self.clock_ahead_s);
        let (host, time, digest) = (self.address.to_string(), date.basic(), digest_of(body));
        let own = [("host", host.as_str()), (DATE, &time), (CONTENT_DIGEST, &digest)];
        for (name, value) in own.iter().chain(headers) {
            let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| wrong(()))?;
            all.insert(name, HeaderValue::from_str(value).map_err(|_| wrong(()))?);
        }
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        let pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        let text = |text: &str| decode(text).ok_or_else(|| wrong(()));
        let query: io::Result<Vec<_>> =
            pairs.map(|(name, value)| Ok((text(name)?, text(value)?))).collect();
        let query = query?;
        let mut names: Vec<_> = all.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        let names = names.join(";");
        let path = text(path)?;
        let mut head = format!("{method} {}", encode(&path, "/"));
        let shown: Vec<_> = query
            .iter()
            .map(|(name, value)| format!("{}={}", encode(name, ""), encode(value, "")))
            .collect();
        if !shown.is_empty() {
            head.push('?');
            head.push_str(&shown.join("&"));
        }
        head.push_str(" HTTP/1.1\r\n");
        for (name, value) in &all {
            head.push_str(&format!("{name}: {}\r\n", String::from_utf8_lossy(value.as_bytes())));
        }
        if let Some(access) = &self.access {
            let signed = Signed { method, path, query: &query, headers: &all, names: &names };
            let scope = Scope { secret: &access.secret, date, region: &self.region };
            let line = authorization(&access.key, &scope, &signed);
            head.push_str(&format!("authorization: {line}\r\n"));
        }
        head.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
        Ok(head)
    }
}

fn receive(
    connection: &mut BufReader<TcpStream>,
    method: &str,
    sent: Instant,
) -> io::Result<Reply> {
    let no_http = || io::Error::from(io::ErrorKind::InvalidData);
    let mut line = String::new();
    let mut next = |line: &mut String| {
        line.clear();
        match connection.read_line(line)? {
            0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
            _ => Ok(()),
        }
    };
    next(&mut line)?;
    let first_byte = sent.elapsed();
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.ok_or_else(no_http)?;
    let mut headers = HeaderMap::new();
    loop {
        next(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| no_http())?;
        headers.append(name, HeaderValue::from_str(value.trim()).map_err(|_| no_http())?);
    }
    let len = headers.get("content-length").and_then(|value| value.to_str().ok());
    let len = len.map_or(Ok(0), str::parse).map_err(|_| no_http())?;
    let mut body = vec![0; if method == "HEAD" { 0 } else { len }];
    connection.read_exact(&mut body)?;
    Ok(Reply { status, headers, body, first_byte })
}
