//! The service `Images`.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use tonic::{Request, Response, Status};
use vmcast_common::status;
use vmcast_proto::v1::{self as pb, images_server::Images};

use super::{Context, Step, Stream, convert, operator, reader};
use crate::deployment::ImportOf;

/// The service.
#[derive(Debug, Clone)]
pub struct ImagesApi(pub Context);

#[tonic::async_trait]
impl Images for ImagesApi {
    type ImportStream = Stream<pb::ImportImageResponse>;

    async fn import(
        &self,
        request: Request<pb::ImportImageRequest>,
    ) -> Result<Response<Self::ImportStream>, Status> {
        operator(&request, "Images.Import")?;
        let pb::ImportImageRequest { name, host, datastore, files, domain } = request.into_inner();
        let name = convert::image_name("name", name)?;
        let host = convert::host_name("host", host)?;
        let of = if domain.is_empty() {
            ImportOf::Files { datastore: convert::datastore_name("datastore", datastore)?, files }
        } else if datastore.is_empty() && files.is_empty() {
            ImportOf::Domain(domain)
        } else {
            return Err(status::invalid("domain", "give either a datastore and files, or a domain"));
        };
        let import = self.0.handle.call(move |core, now| core.engine.import(now, name, host, of));
        let id = import.await??;
        let seen = Arc::new(AtomicU64::new(0));
        let stream = self.0.watch(move |handle| {
            let seen = seen.clone();
            async move {
                let import =
                    handle.call(move |core, _| core.engine.import_status(id)).await?.ok_or_else(|| {
                        status::not_found("import", &id.to_string(), "the import is not known any more")
                    })?;
                let mut message = pb::ImportImageResponse {
                    hashed_bytes: import.hashed,
                    total_bytes: import.total,
                    image: None,
                };
                if let Some(outcome) = import.outcome {
                    message.image = Some(convert::image(&outcome?));
                    return Ok(Step { message: Some(message), last: true });
                }
                let new = seen.swap(import.hashed, Ordering::Relaxed) != import.hashed;
                Ok(Step { message: new.then_some(message), last: false })
            }
        });
        Ok(Response::new(stream))
    }

    async fn list(
        &self,
        request: Request<pb::ListImagesRequest>,
    ) -> Result<Response<pb::ListImagesResponse>, Status> {
        reader(&request)?;
        let images = self.0.handle.call(|core, _| core.engine.images().map(convert::image).collect()).await?;
        Ok(Response::new(pb::ListImagesResponse { images }))
    }

    async fn remove(
        &self,
        request: Request<pb::RemoveImageRequest>,
    ) -> Result<Response<pb::RemoveImageResponse>, Status> {
        operator(&request, "Images.Remove")?;
        let name = convert::image_name("name", request.into_inner().name)?;
        self.0.handle.call(move |core, now| core.engine.remove_image(now, &name)).await??;
        Ok(Response::new(pb::RemoveImageResponse {}))
    }
}
