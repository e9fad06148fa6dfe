//! Starting, readiness, draining and stopping.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use actix_web::dev::ServerHandle;
use actix_web::middleware::{Condition, from_fn};
use actix_web::{App, HttpServer, web};

use super::auth::Keys;
use super::health::{Health, Life};
use super::live::{Lives, StoppedBy};
use super::metrics::Metrics;
use super::problem::{Kind, Problem};
use super::queue::{Job, Queue};
use super::sites::Sites;
use super::speed::Speed;
use super::store::Store;
use super::vote::tables::Tables;
use super::{Settings, jobs, routes, worker};
use crate::engine::request::{GenerateRequest, ModelInfo};
use crate::engine::{Backend, CancelToken};
use crate::{Error, Result};

/// After the drain: for a running step to notice that it is cancelled, and for
/// answers to reach their clients.
const GRACE: Duration = Duration::from_secs(3);

/// What HTTP threads and generation threads share.
pub struct Shared {
    pub settings: Settings,
    pub queue: Queue,
    pub lives: Lives,
    pub store: Store,
    pub speed: Speed,
    pub keys: Option<Keys>,
    pub metrics: Metrics,
    pub health: Health,
    pub sites: Sites,
    pub tables: Tables,
    backend: OnceLock<Arc<dyn Backend>>,
}

impl Shared {
    /// The backend, once it is loaded.
    pub fn backend(&self) -> Result<Arc<dyn Backend>, Problem> {
        self.backend
            .get()
            .cloned()
            .ok_or_else(|| Problem::new(Kind::NotReady, "loading models").retry_after(5))
    }
}

enum Event {
    Stop,
    Failed(Error),
}

/// Asks a running server to drain and end; may be cloned and sent anywhere.
#[derive(Clone)]
pub struct Stopper(Sender<Event>);

impl Stopper {
    /// Stops admitting work at once; [`Running::wait`] returns when it is done.
    pub fn stop(&self) {
        // A server that has already ended needs no telling.
        let _ = self.0.send(Event::Stop);
    }
}

/// A started server.
pub struct Running {
    address: SocketAddr,
    shared: Arc<Shared>,
    events: (Sender<Event>, Receiver<Event>),
    http: ServerHandle,
    http_thread: JoinHandle<()>,
    deadlines: JoinHandle<()>,
    workers: Vec<JoinHandle<()>>,
}

/// Binds, serves at once (health and the page), and loads the backend on a
/// thread of its own; generations are admitted when it has warmed up.
///
/// # Errors
/// The address cannot be bound, the history cannot be opened, or a thread cannot be started. That loading
/// failed is what [`Running::wait`] reports.
pub fn start(
    settings: Settings,
    open: impl FnOnce() -> Result<Arc<dyn Backend>> + Send + 'static,
) -> Result<Running> {
    let listener = bind(&settings.listen)?;
    let address = listener.local_addr().map_err(|e| Error::invalid("listen", e.to_string()))?;
    let keys = keys(&settings, address)?;
    let shared = Arc::new(Shared {
        queue: Queue::new(settings.queue, settings.queue_f, settings.workers),
        lives: Lives::default(),
        store: Store::open(&settings.data, settings.keep)?,
        speed: Speed::default(),
        keys,
        metrics: Metrics::new()?,
        health: Health::default(),
        sites: Sites::new(&settings, address),
        tables: Tables::default(),
        backend: OnceLock::new(),
        settings,
    });
    let events = mpsc::channel();
    let (http, http_thread) = serve(listener, Arc::clone(&shared), events.0.clone())?;
    let worker = |index| {
        let shared = Arc::clone(&shared);
        spawn(&format!("generate-{index}"), move || worker::work(&shared))
    };
    let workers = (0..shared.settings.workers).map(worker).collect::<Result<_>>()?;
    let keeping = Arc::clone(&shared);
    let deadlines = spawn("deadlines", move || jobs::keep_deadlines(&keeping))?;
    let (loading, failed) = (Arc::clone(&shared), events.0.clone());
    spawn("load", move || {
        if let Err(error) = load(&loading, open) {
            // If nobody waits any more, the server is ending anyway.
            let _ = failed.send(Event::Failed(error));
        }
    })?;
    Ok(Running { address, shared, events, http, http_thread, deadlines, workers })
}

/// The keys that requests need; without a file everybody may do everything.
fn keys(settings: &Settings, address: SocketAddr) -> Result<Option<Keys>> {
    if !settings.keys.as_os_str().is_empty() {
        return Keys::read(&settings.keys).map(Some);
    }
    if !address.ip().is_loopback() {
        tracing::warn!(listen = %address, "no API keys: whoever reaches this address may do everything");
    }
    Ok(None)
}

fn bind(listen: &str) -> Result<TcpListener> {
    TcpListener::bind(listen).map_err(|error| {
        let message = match error.kind() {
            ErrorKind::AddrInUse => {
                format!("{listen} is already in use; give another address with --listen")
            }
            ErrorKind::InvalidInput => format!("'{listen}' is not ADDRESS:PORT"),
            _ => format!("{listen} cannot be bound: {error}"),
        };
        Error::invalid("listen", message)
    })
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    thread::Builder::new()
        .name(name.to_owned())
        .stack_size(worker::STACK_BYTES)
        .spawn(body)
        .map_err(|e| Error::invalid("threads", format!("{name} was not started: {e}")))
}

fn serve(
    listener: TcpListener,
    shared: Arc<Shared>,
    failed: Sender<Event>,
) -> Result<(ServerHandle, JoinHandle<()>)> {
    let (send_handle, handle) = mpsc::channel();
    let settings = shared.settings.clone();
    let threads = settings.http_threads;
    let body = move || {
        let data = web::Data::from(shared);
        let run = async move {
            let server = HttpServer::new(move || {
                let sites = &data.sites;
                App::new()
                    .app_data(data.clone())
                    .wrap(from_fn(routes::admit))
                    .wrap(Condition::new(sites.opened(), sites.cors()))
                    .wrap(from_fn(routes::openai::in_its_words))
                    .wrap(from_fn(routes::observe))
                    .configure(routes::configure)
            })
            .workers(threads)
            .disable_signals()
            // The limit is each thread's.
            .max_connections(settings.max_connections.div_ceil(threads))
            .keep_alive(Duration::from_secs(settings.keep_alive_seconds))
            .client_request_timeout(Duration::from_secs(settings.head_seconds))
            .client_disconnect_timeout(GRACE)
            // Without this actix does not notice that a client has left.
            .h1_allow_half_closed(false)
            .shutdown_timeout(GRACE.as_secs())
            .listen(listener)?
            .run();
            // The starter waits for exactly this.
            let _ = send_handle.send(server.handle());
            server.await
        };
        if let Err(error) = actix_web::rt::System::new().block_on(run) {
            // If nobody waits any more, the server is ending anyway.
            let _ = failed.send(Event::Failed(Error::invalid("http", error.to_string())));
        }
    };
    let thread = thread::Builder::new()
        .name("http".to_owned())
        .spawn(body)
        .map_err(|e| Error::invalid("threads", format!("http was not started: {e}")))?;
    let handle = handle
        .recv()
        .map_err(|_| Error::invalid("http", "the HTTP server ended while starting"))?;
    Ok((handle, thread))
}

fn load(shared: &Shared, open: impl FnOnce() -> Result<Arc<dyn Backend>>) -> Result<()> {
    let start = Instant::now();
    let backend = open()?;
    let models = backend.models();
    let (unloaded, seconds) = (backend.unloaded(), start.elapsed().as_secs_f64());
    shared.metrics.loaded(&models, &unloaded, &backend.methods(), seconds);
    let backend = shared.backend.get_or_init(|| backend);
    shared.health.advance(Life::Warming);
    if let Some(first) = models.first() {
        warm_up(shared, backend.as_ref(), first)?;
    }
    for model in &models {
        shared.metrics.model(model, true);
    }
    jobs::resume(shared, backend.as_ref())?;
    shared.health.advance(Life::Ready);
    tracing::info!("ready");
    Ok(())
}

/// Generates one image with few steps, so that the first request does not pay
/// for first-use costs and the machine's speed is known.
///
/// # Errors
/// The backend's.
pub fn warm_up(shared: &Shared, backend: &dyn Backend, model: &ModelInfo) -> Result<()> {
    let steps = shared.settings.warm_up_steps;
    if steps == 0 {
        return Ok(());
    }
    let prompt = model.example_prompts.first().cloned().unwrap_or_else(|| "warm-up".to_owned());
    let request = GenerateRequest {
        prompt,
        model: Some(model.id.clone()),
        steps: Some(steps),
        seed: Some(0),
        ..GenerateRequest::default()
    };
    let start = Instant::now();
    let planned = backend.plan(&request)?;
    let generation = backend.generate(&planned, &CancelToken::default(), &mut |_| {})?;
    let seconds = start.elapsed().as_secs_f64();
    shared.queue.measure(seconds, generation.cost.actual.units.f);
    shared.speed.learn_first(&generation.resolved, &generation.cost.actual, seconds);
    tracing::info!(seconds, steps, "warmed up");
    Ok(())
}

impl Running {
    /// Where it listens; the port is real even when 0 was asked for.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A handle that stops it from elsewhere.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        Stopper(self.events.0.clone())
    }

    /// Serves until it is stopped, then finishes accepted work within the
    /// drain time and ends.
    ///
    /// # Errors
    /// The backend could not be loaded or warmed up, or HTTP failed.
    pub fn wait(self) -> Result<()> {
        let failure = match self.events.1.recv() {
            Ok(Event::Failed(error)) => Some(error),
            Ok(Event::Stop) | Err(_) => None,
        };
        self.shared.health.advance(Life::Draining);
        let queue = &self.shared.queue;
        postpone(queue.close());
        let stats = queue.stats();
        let drain = Duration::from_secs(self.shared.settings.drain_seconds);
        tracing::info!(waiting = stats.waiting, running = stats.running, "draining");
        if failure.is_some() || !queue.wait_idle(drain) {
            let left = queue.stats();
            if left.waiting + left.running > 0 {
                tracing::warn!(waiting = left.waiting, running = left.running, "cancelling");
            }
            postpone(queue.abort(|live| live.stop(StoppedBy::Shutdown)));
            queue.wait_idle(GRACE);
            // In the middle of a long step: not a crash.
            queue.running().iter().for_each(|live| jobs::stopped(&self.shared, live));
        }
        queue.end();
        let idle = queue.wait_idle(Duration::ZERO);
        // Sends the command now; the thread ends when connections are closed.
        drop(self.http.stop(true));
        // One that is in the middle of a long step ends with the process.
        let workers = self.workers.into_iter().filter(|_| idle);
        for thread in [self.http_thread, self.deadlines].into_iter().chain(workers) {
            let name = thread.thread().name().unwrap_or_default().to_owned();
            if thread.join().is_err() {
                return Err(Error::invalid(name, "the thread panicked"));
            }
        }
        if idle {
            self.shared.store.close();
        }
        failure.map_or(Ok(()), Err)
    }
}

/// Tells whoever waits for work that does not begin any more.
fn postpone(jobs: Vec<Job>) {
    jobs.iter().for_each(|job| jobs::postpone(&job.live));
}
