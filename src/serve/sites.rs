//! Names that the server is reached under, and other sites' pages. A browser that is on this
//! machine must not reach the server for a page from elsewhere, neither by a name that points
//! here (DNS rebinding) nor by posting across sites.

use std::net::SocketAddr;

use actix_cors::Cors;
use actix_web::HttpRequest;
use actix_web::http::{Method, Uri, header};

use super::Settings;
use super::config::List;
use super::problem::{Kind, Problem};
use crate::{Error, Result};

/// Names of this machine.
const LOOPBACK: [&str; 3] = ["localhost", "127.0.0.1", "[::1]"];
const METHODS: [&str; 5] = ["GET", "HEAD", "POST", "PUT", "DELETE"];
/// What a page may send.
const SENT: [&str; 6] =
    ["accept", "authorization", "content-type", "last-event-id", "prefer", "x-api-key"];
/// What it may read.
const READ: [&str; 6] = [
    "location",
    "preference-applied",
    "retry-after",
    "server-timing",
    "www-authenticate",
    "x-request-id",
];
/// Seconds for which a browser remembers what it may.
const REMEMBER: usize = 600;

/// Checks the settings that lists of names come from.
///
/// # Errors
/// An entry is not a host name, or not an origin.
pub fn check(hosts: &List, origins: &List) -> Result<()> {
    for host in hosts.iter() {
        if name_of(host) != host || host.is_empty() || host.contains(['/', '*', '@', ' ']) {
            let message = format!("'{host}' must be a host name in small letters without a port");
            return Err(Error::invalid("hosts", message));
        }
    }
    for origin in origins.iter() {
        let parts = origin.parse::<Uri>().ok().map(Uri::into_parts);
        let whole = parts.and_then(|p| Some(format!("{}://{}", p.scheme?, p.authority?)));
        let exact = whole.as_ref() == Some(origin) && *origin == origin.to_ascii_lowercase();
        if !exact || origin.contains(['*', '@']) {
            let message = format!("'{origin}' must be SCHEME://HOST or SCHEME://HOST:PORT");
            return Err(Error::invalid("cors_origins", message));
        }
    }
    Ok(())
}

/// Who may use this server from a browser.
#[derive(Clone, Debug)]
pub struct Sites {
    /// Every name where there is none.
    hosts: Option<Vec<String>>,
    origins: List,
}

impl Sites {
    /// Of a server that listens at `address`.
    #[must_use]
    pub fn new(settings: &Settings, address: SocketAddr) -> Self {
        let any = settings.hosts.is_empty() && !address.ip().is_loopback();
        let names = LOOPBACK.into_iter().chain(settings.hosts.iter().map(String::as_str));
        let hosts = (!any).then(|| names.map(str::to_owned).collect());
        Self { hosts, origins: settings.cors_origins.clone() }
    }

    /// Whether pages of any other site may use the API.
    #[must_use]
    pub fn opened(&self) -> bool {
        !self.origins.is_empty()
    }

    /// The headers that tell browsers so.
    pub fn cors(&self) -> Cors {
        self.origins
            .iter()
            .fold(Cors::default(), |cors, origin| cors.allowed_origin(origin))
            .allowed_methods(METHODS)
            .allowed_headers(SENT)
            .expose_headers(READ)
            .max_age(REMEMBER)
            // Without the headers the browser refuses; what changes something is refused here.
            .block_on_origin_mismatch(false)
    }

    /// # Errors
    /// 421 for a name that is not this server's, 403 for another site's page that would change
    /// something.
    pub fn admit(&self, request: &HttpRequest) -> Result<(), Problem> {
        let text = |value: &header::HeaderValue| {
            String::from_utf8_lossy(value.as_bytes()).to_ascii_lowercase()
        };
        let headers = request.headers();
        let named: Vec<String> = headers
            .get_all(header::HOST)
            .map(text)
            .chain(request.uri().authority().map(|a| a.as_str().to_ascii_lowercase()))
            .collect();
        if let Some(hosts) = &self.hosts
            && (named.is_empty() || !named.iter().all(|n| hosts.iter().any(|h| name_of(n) == h)))
        {
            let found = named.first().map_or("no name", |name| name.as_str());
            let detail = format!("this server is not reached as {found:?}; `hosts` lists names");
            return Err(Problem::new(Kind::MisdirectedRequest, detail));
        }
        let safe = [Method::GET, Method::HEAD, Method::OPTIONS].contains(request.method());
        let Some(origin) = headers.get(header::ORIGIN).map(text).filter(|_| !safe) else {
            return Ok(());
        };
        let own = origin.split_once("://").is_some_and(|(_, host)| named.iter().any(|n| n == host));
        if own || self.origins.contains(&origin) {
            return Ok(());
        }
        let detail = format!("pages of {origin:?} may not do this; `cors_origins` lists origins");
        Err(Problem::new(Kind::Forbidden, detail))
    }
}

/// A host's name without its port.
fn name_of(host: &str) -> &str {
    let end = match host.rfind(']') {
        Some(bracket) => bracket + 1,
        None => host.find(':').unwrap_or(host.len()),
    };
    let name = &host[..end];
    name.strip_suffix('.').unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;

    use super::*;

    fn sites(listen: &str, hosts: &str, origins: &str) -> Sites {
        let (hosts, cors_origins) = (hosts.parse().unwrap(), origins.parse().unwrap());
        let settings = Settings { hosts, cors_origins, ..Settings::default() };
        check(&settings.hosts, &settings.cors_origins).unwrap();
        Sites::new(&settings, listen.parse().unwrap())
    }

    fn status(sites: &Sites, request: TestRequest) -> u16 {
        sites.admit(&request.to_http_request()).map_or_else(|p| p.kind.status(), |()| 200)
    }

    fn get(host: &str) -> TestRequest {
        TestRequest::get().insert_header(("host", host))
    }

    fn post(host: &str, origin: &str) -> TestRequest {
        TestRequest::post().insert_header(("host", host)).insert_header(("origin", origin))
    }

    #[test]
    fn a_loopback_address_is_reached_by_its_names_only() {
        for listen in ["127.0.0.1:80", "[::1]:80", "127.9.9.9:80"] {
            let sites = sites(listen, "", "");
            for host in
                ["localhost", "LocalHost:8080", "127.0.0.1:1", "[::1]:9", "[::1]", "localhost."]
            {
                assert_eq!(status(&sites, get(host)), 200, "{host}");
            }
            for host in [
                "evil.example",
                "localhost.evil.example:80",
                "127.0.0.1.evil.example",
                "",
                "[::2]",
                "a]localhost",
            ] {
                assert_eq!(status(&sites, get(host)), 421, "{host}");
            }
            assert_eq!(status(&sites, TestRequest::get()), 421, "none");
            assert_eq!(status(&sites, get("localhost").uri("http://evil.example/")), 421);
        }
    }

    #[test]
    fn elsewhere_any_name_does_unless_names_are_given() {
        assert_eq!(status(&sites("0.0.0.0:80", "", ""), get("a.example:80")), 200);
        assert_eq!(status(&sites("0.0.0.0:80", "", ""), TestRequest::get()), 200);
        let named = sites("0.0.0.0:80", "a.example,b", "");
        let found = ["a.example:8", "b", "localhost", "c", "x.b"].map(|h| status(&named, get(h)));
        assert_eq!(found, [200, 200, 200, 421, 421]);
    }

    #[test]
    fn only_own_and_listed_pages_change_something() {
        let sites = sites("127.0.0.1:8080", "", "https://a.example");
        let host = "localhost:8080";
        for (origin, expected) in [
            ("http://localhost:8080", 200),
            ("https://a.example", 200),
            ("http://a.example", 403),
            ("https://a.example.evil", 403),
            ("http://localhost:9", 403),
            ("null", 403),
            ("", 403),
            ("http://evil.example", 403),
        ] {
            assert_eq!(status(&sites, post(host, origin)), expected, "{origin}");
        }
        assert_eq!(status(&sites, post(host, "null").method(Method::DELETE)), 403);
        assert_eq!(status(&sites, post(host, "null").method(Method::GET)), 200);
        assert_eq!(status(&sites, TestRequest::post().insert_header(("host", host))), 200);
    }

    #[test]
    fn lists_hold_names_and_origins() {
        let of = |hosts: &str, origins: &str| {
            check(&hosts.parse().unwrap(), &origins.parse().unwrap()).map_err(|e| e.to_string())
        };
        assert!(of("a.example,[::2]", "http://a,https://b:1").is_ok());
        for host in ["a:80", "http://a", "*", "*.a", "a/b"] {
            assert!(of(host, "").unwrap_err().starts_with("hosts: '"), "{host}");
        }
        for origin in [
            "*",
            "a.example",
            "https://a/",
            "https://A",
            "https://*.a",
            "https://a/b",
            "null",
            "https://u@a",
        ] {
            assert!(of("", origin).unwrap_err().starts_with("cors_origins: '"), "{origin}");
        }
    }
}
